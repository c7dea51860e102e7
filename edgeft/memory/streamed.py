"""Which bytes of a base are in memory, and which are read, where its layers' matrices stay in their files?

The table of embeddings stays there too, unless the head is tied to it or it trains. A CPU has pages of the files, a GPU
copies of two layers, which go through pinned buffers of the host.
"""

from __future__ import annotations

from edgeft.models.spec import STORED_BYTES, ModelSpec
from edgeft.settings.job import Training
from edgeft.units import MIB

STORED_AS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
KEPT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NF4_CODES = 0.5  # bytes of a weight that stay in the file; its scales do not
ROW_BYTES = 2**16  # of a mapped file that become resident where one byte is looked at, on Linux
# Of the way to a GPU: each of the two pinned buffers, and what a matrix's place among its layer's is a multiple of.
PIECE_BYTES, ALIGNED = 16 * MIB, 256


def casts(spec: ModelSpec, training: Training) -> bool:
    """Whether matrices are stored in another dtype than the plan keeps them in, and are cast for every product."""
    return training.stream_layers and training.base_precision != "nf4" and stored_as(training) != spec.dtype


def stored_as(training: Training) -> str:
    """The dtype of files whose pages are weights as the plan keeps them."""
    return STORED_AS[training.base_precision]


def matrices(spec: ModelSpec) -> int:
    """Weights of one layer that stay in the file."""
    return sum(linear.in_features * linear.out_features for linear in spec.linears)


def learns_in_turn(training: Training) -> bool:
    """Whether layers come and go that train as dense ones: what they learnt are pages of files of their own then."""
    return training.stream_layers and training.densely and training.lisa_interval > 0


def kept_itemsize(training: Training) -> float:
    """Bytes of a matrix's weight as the plan keeps it; of 4 bits what stays in the file."""
    return NF4_CODES if training.base_precision == "nf4" else KEPT_BYTES[training.base_precision]


def layer_file_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of one layer that are read from the file each time it computes, whether or not it has had a turn."""
    own = kept_itemsize(training)
    itemsize = own if training.base_precision == "nf4" else STORED_BYTES.get(spec.dtype, 4)
    return int(max(itemsize, own if learns_in_turn(training) else 0) * matrices(spec))


def learnt_pages_bytes(spec: ModelSpec, training: Training, layers: int) -> int:
    """Bytes of the files that have layers after their turn as the base has its own; what fp32 ones learnt is that."""
    if not learns_in_turn(training) or training.base_precision == "fp32":
        return 0
    return int(kept_itemsize(training) * matrices(spec)) * layers


def layer_away_bytes(spec: ModelSpec, training: Training) -> int:
    """What of one layer, held as the plan says, is not in memory."""
    if not training.stream_layers:
        return 0
    return int(kept_itemsize(training) * matrices(spec))


def table_streams(spec: ModelSpec, training: Training) -> bool:
    """Whether rows of the embedding are read as they are asked."""
    return training.stream_layers and not spec.tie_word_embeddings and training.embedding == "off"


def away_bytes(spec: ModelSpec, training: Training) -> int:
    """What of a base, held as the plan says, is not in memory."""
    dense = training.compute_dtype if training.base_precision == "nf4" else training.base_precision
    table = KEPT_BYTES[dense] * spec.embedding_parameters if table_streams(spec, training) else 0
    return layer_away_bytes(spec, training) * spec.num_hidden_layers + table


def window_bytes(spec: ModelSpec, training: Training) -> int:
    """The layer that computes, the one that comes next, on a CPU rows of the embedding; nothing without streams."""
    if not training.stream_layers:
        return 0
    two = min(2, spec.num_hidden_layers) * layer_file_bytes(spec, training)
    return two + (rows_bytes(spec, training) if training.device == "cpu" else 0)


def rows_bytes(spec: ModelSpec, training: Training) -> int:
    """Pages of rows of the embedding, on the host: of a row that is looked at, what lies around it comes along."""
    most = STORED_BYTES.get(spec.dtype, 4) * spec.embedding_parameters
    rows = min(most, ROW_BYTES * training.micro_batch_size * training.max_length)
    return rows if table_streams(spec, training) else 0


def passing_bytes(spec: ModelSpec, training: Training) -> int:
    """What of the host a GPU's layers in files take: pinned buffers, the piece that is read, rows of the embedding."""
    if not training.stream_layers or training.device == "cpu":
        return 0
    return 3 * PIECE_BYTES + rows_bytes(spec, training)


def files_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of the files that all layers are read from, once each; nothing without streams."""
    return spec.num_hidden_layers * layer_file_bytes(spec, training) if training.stream_layers else 0

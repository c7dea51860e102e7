# %% [markdown]
# # Which model fits which machine?
#
# Nothing here needs a GPU, weights or a network: a plan is computed from a model's `config.json` and a machine's
# numbers. `pip install edgeft` is enough.

# %%
import edgeft

folder = edgeft.example("edgeft-example")  # a small model with data, and the shapes of 46 models

# %% [markdown]
# One model, one machine, one device. The plan says first whether it fits, what it *needs* (the least memory at this
# quality), what it *uses* (the fastest way within the budget), and what is given up for it.

# %%
plan = edgeft.plan(model=str(folder / "shapes" / "llama-3.1-8b"), profile="t4", device="raspberrypi5-8gb")
plan

# %% [markdown]
# Every number of it is a field: of the whole plan, of each phase, and of each other way that was looked at.

# %%
GIB = 2**30
print(f"needs {plan.need_bytes / GIB:.1f} GiB, uses {plan.peak_bytes / GIB:.1f} of {plan.budget_bytes / GIB:.1f} GiB")
for line in plan.gave_up:
    print("given up:", line)

# %% [markdown]
# A budget is an input as well. What can be done with 9 GiB?

# %%
from edgeft.errors import DoesNotFit

for name in ("qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-3b", "mistral-7b", "qwen2.5-32b"):
    try:
        found = edgeft.plan(model=str(folder / "shapes" / name), profile="t4", max_memory_bytes=9 * GIB)
    except DoesNotFit as problem:
        print(f"{name:14} does not fit. {problem.hint}")
    else:
        way = found.training
        print(f"{name:14} {way.tuner}, base in {way.base_precision}, {found.need_bytes / GIB:.1f} GiB")

# %% [markdown]
# Models by machines, and by the devices that they are for.

# %%
shapes = [folder / "shapes" / name for name in ("smollm2-360m", "llama-3.2-1b", "llama-3.1-8b")]
matrix = edgeft.matrix(shapes, ["t4", "rtx4060-8gb", "raspberrypi5-8gb"])
matrix

"""What can be written with a tokenizer under a grammar, as llguidance reads it? (no torch)"""

from __future__ import annotations

import random
from typing import Any

from edgeft.data.grammar import FREE, Grammar
from edgeft.data.labels import AskedAnswers
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput
from edgeft.machines.extras import missing
from edgeft.machines.runner import runner_module

WALK_TOKENS = 2048  # of answers that are written by chance, to see whether the tokenizer can


class Words:
    """A tokenizer as llguidance reads it, and what can be written with it. Raises MissingExtra without llguidance."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer, self.runner = tokenizer, runner_module()
        try:
            kind = self.runner.runtime("llguidance", "llguidance").LLTokenizer
        except self.runner.MissingRuntime as problem:
            raise missing("llguidance", str(problem.problem), "grammars") from None
        try:
            self.words: Any = kind(tokenizer.backend.to_str(), eos_token=tokenizer.stop_ids)
        except Exception as problem:  # a bare ValueError or RuntimeError for whatever a tokenizer holds
            raise BadInput("answers", f"llguidance cannot read the tokenizer: {problem}", FREE) from None

    def matcher(self, grammar: Grammar) -> Any:
        """run.py's own, at the beginning of an answer. Raises BadInput for a grammar that cannot be read."""
        try:
            return self.reader(self.runner.Grammar(grammar.form, grammar.text))
        except self.runner.RunError as problem:
            raise BadInput("answers", f"{grammar.source}: {problem.problem.strip()}", FREE) from None

    def reader(self, grammar: Any) -> Any:
        """`matcher` of run.py's own Grammar. Raises run.py's RunError."""
        return self.runner.Matcher(grammar, self.words, self.tokenizer.stop_ids)

    def checked(self, grammar: Grammar) -> Grammar:
        """The grammar, if answers that are written by chance do not get stuck. Raises BadInput if they do."""
        matcher, draw, made = self.matcher(grammar), random.Random(0), list[int]()
        for _ in range(WALK_TOKENS):
            if matcher.stopped():
                matcher.restart()
                made.clear()
            try:
                allowed = matcher.allowed(self.words.vocab_size).nonzero()[0]
            except self.runner.RunError as problem:
                raise BadInput("answers", f"{grammar.source}: {problem.problem}", FREE) from None
            if not len(allowed):
                said = f"the tokenizer has no token for what must follow {self.tokenizer.spell(made)[-60:]!r}"
                raise BadInput("answers", f"{grammar.source}: {said}", FREE)
            made.append(int(allowed[draw.randrange(len(allowed))]))
            matcher.take(made[-1])
        return grammar

    def within(self, grammar: Grammar, asked: AskedAnswers) -> int:
        """How many of the different answers that were kept are in the grammar, with their end."""
        matcher = self.matcher(grammar)
        return sum(matcher.whole(path) for path in asked.found)

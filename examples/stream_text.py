"""Train a small byte-level model for a moment, compile it, and stream text from one file: python examples/stream_text.py"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import sparsefold as sf
from sparsefold.language import generate
from sparsefold.recipes import text
from sparsefold.vocabulary import Vocabulary


def main(steps: int = 200) -> str:
    """Returns the generated text; more steps make better text."""
    with tempfile.TemporaryDirectory() as folder:
        config = text.Config(hidden=128, steps=steps, density=0.5, eval_every=steps)
        text.run(config, Path(folder), "training")
        model, facts = text.load(Path(folder))
        file = Path(folder) / "text.sfold"
        sf.compile_model(model, facts["about"]).save(file)

        engine = sf.Engine.load(file)  # from here on: numpy only
        vocabulary = Vocabulary.from_metadata(engine.program.metadata)
        stream = engine.stream()
        prompt = vocabulary.encode("The ")
        tokens = list(generate(stream, prompt, 200, 0.7, np.random.default_rng(0)))
        print("The " + vocabulary.decode(tokens).decode("latin-1"))
        print(stream.report())
    return str(vocabulary.decode(tokens), "latin-1")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)

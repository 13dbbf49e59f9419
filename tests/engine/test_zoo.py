"""Every architecture of the zoo: exact where every entry lies in shuffled packed pages, or refused as its row says;
`kvsculpt doctor` says the same.
"""

import json
from pathlib import Path

import pytest

from zoo import ZOO, Model

from .conftest import Engine, script

pytestmark = pytest.mark.engine

JOB = Path(__file__).with_name("zoo_job.py")


class Machines:
    """One process for stock vLLM and one for compression; one that has died is started anew for the next model."""

    def __init__(self) -> None:
        self._running: dict[str, Engine] = {}

    def ask(self, way: str, directory: Path, model: Model) -> dict:
        """What became of a model, run in one `way`: `stock` or `packed`."""
        engine = self._running.pop(way, None) or Engine(script(JOB, way))
        answer = engine.run(json.dumps({"model": str(directory), "engine": model.engine}))
        self._running[way] = engine
        return answer

    def stop(self) -> None:
        """End the processes."""
        for engine in self._running.values():
            engine.stop()


@pytest.fixture(scope="module")
def machines():
    machines = Machines()
    yield machines
    machines.stop()


@pytest.mark.parametrize("model", ZOO, ids=lambda model: f"{model.name}, {model.particular}")
def test_a_model_is_exact_or_refused_as_the_table_says(machines, model, tmp_path):
    directory = model.write(tmp_path)
    ours = machines.ask("packed", directory, model)
    features = [refusal["feature"] for refusal in ours["refused"]]
    if model.refused:
        assert any(feature.startswith(model.refused) for feature in features), ours
        assert ours["judged"].startswith("refused: ") and features[0] in ours["judged"]
        assert all(refusal["cause"] and refusal["cure"] for refusal in ours["refused"])
        return
    assert not features and not ours["judged"]
    stock = machines.ask("stock", directory, model)
    one, other = stock["tokens"]
    # Else nothing would be shown: what is packed decides about the tokens, and so does what they follow.
    assert one != other and min(len(set(one)), len(set(other))) > 1
    assert ours["tokens"] == stock["tokens"]
    assert [(told["outcome"], told["segments"]) for told in ours["told"]] == [("compressed", 2)] * 2
    # Entries that are all kept do not show what fits would have been told of the model's softmax.
    assert ours["soft_caps"] == [model.changes.get("attn_logit_softcapping")] * 4
    assert ours["fitted_with_sinks"] == [ours["sinks"]] * 4 and bool(ours["sinks"]) == (model.name == "gpt-oss")

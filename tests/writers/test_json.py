"""JSON: it validates against the published schema, which describes every field, and equal reports give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jsonschema
import numpy as np
import pytest

from neuronscope.report.report import SCHEMA_VERSION, Report

from . import sample_reports as samples

SCHEMA: dict[str, Any] = json.loads(
    (files("neuronscope.writers") / "assets" / "report.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SAMPLES = (samples.mixed, samples.healthy, samples.broken, samples.unwatched, samples.hostile)


def test_the_json_schema_is_the_one_of_this_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_report_in_json_fits_the_schema_and_reads_back_complete(sample: Callable[[], Report]) -> None:
    text = sample().to_json()
    plain = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    VALIDATOR.validate(plain)
    assert plain == sample().to_dict()


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    return resolve(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]) if "$ref" in schema else schema


def undescribed(value: Any, schema: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Paths of fields that the schema says nothing of, and of fields it lists that are not there."""
    schema = resolve(schema)
    if isinstance(value, dict) and path != "$.versions":
        for key in value.keys() ^ schema["properties"].keys():
            yield f"{path}.{key}"
        for key in value.keys() & schema["properties"].keys():
            yield from undescribed(value[key], schema["properties"][key], f"{path}.{key}")
    elif isinstance(value, list) and value and "items" in schema:
        yield from undescribed(value[0], schema["items"], f"{path}[]")


def test_the_schema_describes_every_field_and_no_other() -> None:
    points = ((10, 0.5), (20, float("nan")))
    series = dict.fromkeys(("learning_rate", "loss", "gradient_norm"), points)
    report = samples.mixed()
    latents = replace(report.layers[0], idle_positions=np.arange(report.layers[0].neurons))  # as only sparse ones have
    layers = (latents, *report.layers[1:])
    plain = replace(report, layers=layers, series=series, checkpoints=(10,)).to_dict()
    VALIDATOR.validate(plain)
    assert list(undescribed(plain, SCHEMA)) == []
    assert plain["series"]["loss"] == {"steps": [10, 20], "values": [0.5, None]}


def spoil(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = path.split(".")

    def change(plain: Any) -> None:
        for key in way:
            plain = plain[int(key) if key.isdigit() else key]
        if value is ...:
            del plain[last]
        else:
            plain[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layers.0.dead", ...),
        ("layers.0.labels.3", "sleepy"),
        ("layers.0.zero_output_fraction.0", 1.5),
        ("layers.0.history.levels.0.0", 256),
        ("layers.0.kind", "relu"),
        ("summary.dead", -1),
        ("window.long_enough", "yes"),
        ("window.provisional", "no"),
        ("window.bound", 1.1),
        ("schema_version", 1),
        ("policy.confidence", 1.0),
        ("not_measured.0.reason", ...),
    ],
)
def test_the_schema_refuses_wrong_documents(path: str, value: Any) -> None:
    plain = json.loads(samples.mixed().to_json())
    spoil(path, value)(plain)
    assert not VALIDATOR.is_valid(plain)


def test_equal_reports_give_equal_bytes_whatever_the_order_of_their_dicts() -> None:
    whole = samples.mixed()
    turned = replace(
        whole,
        versions=dict(reversed(whole.versions.items())),
        policy=dict(reversed(whole.policy.items())),
    )
    assert turned.to_json() == whole.to_json()


def test_what_was_not_measured_is_null_and_not_zero() -> None:
    plain = json.loads(samples.unwatched().to_json())
    assert plain["summary"]["dead_percent"] is None
    assert set(plain["layers"][0]["zero_output_fraction"]) == {None}


def test_a_number_that_is_not_finite_is_refused() -> None:
    whole = samples.mixed()
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(whole, policy={**whole.policy, "tolerance": float("inf")}).to_json()


def test_json_text_is_ascii_and_names_read_back_unchanged() -> None:
    name = "réseau.層.\ud800"
    text = samples.report(samples.site(name, 4)).to_json()
    assert text.isascii()
    assert json.loads(text)["layers"][0]["name"] == name

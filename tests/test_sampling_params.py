"""The arguments of generate()."""

import pytest

from pyllm.runtime.sampling import SamplingParams


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": float("nan")}, "temperature: expected a finite number >= 0, got nan"),
        ({"temperature": -1}, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": "hot"}, "temperature: .* got 'hot'"),
        ({"top_p": 1.5}, "top_p: expected a finite number >= 0 and <= 1, got 1.5"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": 1.5}, "top_k: expected an integer"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop_strings": ("",)}, "stop_strings: expected non-empty strings"),
        ({"stop_token_ids": ("x",)}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
def test_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_arguments(arguments)


def test_unknown_argument_names_the_known_ones():
    with pytest.raises(TypeError, match=r"unknown argument 'temprature'; .*temperature"):
        SamplingParams.from_arguments({"temprature": 1.0})


def test_hugging_face_names():
    params = SamplingParams.from_arguments
    assert params({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert params({"do_sample": True}).temperature == 1
    assert params({"do_sample": True, "temperature": 0.7}).temperature == 0.7
    assert params({"eos_token_id": [3, 4], "stop_token_ids": 5}).stop_token_ids == (5, 3, 4)
    assert params({"stop_strings": "end"}).stop_strings == ("end",)

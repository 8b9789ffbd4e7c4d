"""Chat templates: the same text as in transformers, and one clear error on every bad input."""

import datetime

import pytest
from tiny_models import SPECIAL, tiny_hf

from pyllm.loading import open_checkpoint
from pyllm.loading.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return open_checkpoint(tiny_hf(tmp_path_factory.mktemp("hf"), layers=1)).tokenizer()


CHATS = [
    [{"role": "user", "content": "hi \u00e9\n"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "<|im_end|> {{ x }}"},
    ],
]
TEMPLATES = {
    "loops": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}\n{{ m.role }}:"
    "{{ m['content'] | trim }}\n{% endfor %}{{ bos_token }}{{ eos_token }}",
    "tojson": "{{ messages | tojson }}{{ {'b': 1, 'a': '<\u00e9>'} | tojson(indent=2) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ tools is none }}{{ strftime_now('%Y') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}"
    "{% endfor %}{{ add_generation_prompt }}",
}


@pytest.fixture(scope="module")
def transformers_tokenizer(tiny, tmp_path_factory):
    import transformers

    path = tmp_path_factory.mktemp("hf_tokenizer")
    tiny._backend.save(str(path / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def with_template(tokenizer, template):
    return Tokenizer(
        tokenizer._backend,
        "model",
        bos_id=1,
        eos_ids={2},
        chat_template=template,
        special_tokens=tokenizer.special_tokens,
    )


@pytest.mark.parametrize("messages", CHATS, ids=["user", "system", "turns"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("template", [*TEMPLATES, "tiny", "smollm2"])
def test_chat_templates_render_as_in_transformers(
    request, tiny, transformers_tokenizer, template, prompt, messages
):
    if template == "smollm2":
        path = request.getfixturevalue("smollm2")
        source = open_checkpoint(path).metadata["tokenizer.chat_template"]
    else:
        source = TEMPLATES.get(template, tiny.chat_template)
    expected = transformers_tokenizer.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=prompt, tokenize=False
    )
    ours = with_template(tiny, source)
    assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_the_date_in_a_template(tiny):
    ours = with_template(tiny, "{{ strftime_now('%Y-%m-%d') }}")
    days = {str(datetime.date.today())}
    text = ours.apply_chat_template(CHATS[0])
    assert text in days | {str(datetime.date.today())}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: expected a list of dicts, got str"),
        ([], "messages: expected at least one, got an empty list"),
        (["hi"], r"messages\[0\]: expected a dict, got str"),
        ([{"content": "x"}], r"messages\[0\]: expected a role of system, user, .* got None"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\]: expected a role of .* got 'bot'"),
        ([*CHATS[0], {"role": "user"}], r"messages\[1\]: expected content .* str, got NoneType"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: expected a role"),
    ],
)
def test_bad_messages(tiny, messages, message):
    with pytest.raises(ValueError, match=message):
        tiny.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "model: the model has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{% for %}", "chat template: "),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
        ("{{ 1 / 0 }}", "chat template: ZeroDivisionError"),
        ("{{ range(10**9) | list }}", "chat template: .*[Rr]ange"),
        ("{{ undefined_thing.x }}", "chat template: .*undefined"),
    ],
)
def test_templates_that_refuse_or_attack(tiny, template, message):
    with pytest.raises(ValueError, match=message):
        with_template(tiny, template).apply_chat_template(CHATS[0])

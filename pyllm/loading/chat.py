"""Chat templates: Jinja in a sandbox, with the globals and filters that templates rely on.

Follows Hugging Face's conventions (https://huggingface.co/docs/transformers/chat_templating), so
that a template written for them renders the same text.
"""

import datetime
import functools
import json

ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages):
    """ValueError unless `messages` is a list of dicts with a known role and a str content."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages: expected a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one, got an empty list")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}]: expected a dict, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}]: expected a role of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise ValueError(
                f"messages[{i}]: expected content to be a str, got {type(content).__name__}"
            )


@functools.lru_cache(maxsize=8)
def _compile(template):
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks the assistant's part for training; its body renders as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render(template, messages, *, add_generation_prompt, **variables):
    """Renders a chat template; ValueError with the template's own message where it refuses."""
    import jinja2

    check_messages(messages)
    try:
        return _compile(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error}") from None
    except (ArithmeticError, LookupError, TypeError, RecursionError, AttributeError) as error:
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from None

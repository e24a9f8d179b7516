"""Render chat templates from elsewhere, within limits: a process of its own, which `chat_template.py` starts.

Reads a JSON list of templates from stdin; the argument is the limit in seconds of computing. Exits with `TOO_LARGE`
where a template needs too much memory. One that does not end within the limit is ended by SIGXCPU, or from outside.
What else is wrong with a template shows where it is used.
"""

import json
import re
import sys

TOO_LARGE = 3
MEMORY = 1 << 30  # bytes
LONGEST = 1 << 23  # characters
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def main() -> None:
    """Render each template to conversations with and without a system prompt."""
    _limit(int(sys.argv[1]))
    for template in json.load(sys.stdin):
        for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
            try:
                length = _rendered_length(template, messages)
            except MemoryError:
                sys.exit(TOO_LARGE)
            except Exception:  # a template may refuse messages, and refuse them in any way
                continue
            if length > LONGEST:
                sys.exit(TOO_LARGE)


def _rendered_length(template: str, messages: list[dict[str, str]]) -> int:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tag
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": str}
    texts = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    rendered = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **texts)
    return len(rendered)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _limit(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has none
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGXCPU would write one


if __name__ == "__main__":
    main()

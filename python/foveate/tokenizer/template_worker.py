"""The program of the process that renders chat templates: one JSON line in, one out (`chat_template`). Imports nothing of foveate.

A template comes with a checkpoint and can ask for any amount of time and memory in a few bytes, in more ways than a sandbox can list
('a' * 10**9, '%999999999d', nested loops, macros that call themselves). So each rendering has a budget that the system enforces.
"""

import datetime
import json
import resource
import signal
import sys
from typing import Any


def main() -> None:
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start["path"]
    seconds, nbytes = start["seconds"], start["bytes"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process, within C code too
    environment, compiled = _environment(), {}
    import jinja2

    for line in sys.stdin:
        _limit(nbytes + 20 * len(line))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            template, variables = json.loads(line)
            if template not in compiled:
                compiled[template] = environment.from_string(template)
            answer = {"text": compiled[template].render(variables)}
            written = json.dumps(answer)
        except jinja2.TemplateError as error:
            line_number = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            written = json.dumps({"error": f"{error}{line_number}"})
        except MemoryError:
            written = json.dumps({"memory": True})
        except RecursionError:
            written = json.dumps({"error": "it calls itself, or is nested, without end"})
        except Exception as error:
            written = json.dumps({"error": f"{type(error).__name__}: {str(error)[:500]}"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(written + "\n")
        sys.stdout.flush()
        if len(compiled) > 64:
            compiled.clear()


def _limit(nbytes: int) -> None:
    """Limits the address space to nbytes beyond what the process has now."""
    with open("/proc/self/statm") as stream:
        have = int(stream.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = have + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant said, for training; here it is only the text between."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own escapes HTML; the names and defaults are those of transformers
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    main()

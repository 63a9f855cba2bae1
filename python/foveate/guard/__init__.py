"""What may go into a model and come out of it: policies from a file, checked on whole texts and on streams.

    guard = Guard("policy.yaml")
    verdict = guard.check("My card is 4111 1111 1111 1111.", "input")
    for piece in guard.stream(llm.stream(prompt)):
        ...

The page docs/guide/guard.md has the policy file. `foveate serve --guard FILE` applies it to what the server is asked and answers.
"""

from foveate.guard.audit import AuditLog
from foveate.guard.policy import read_policy
from foveate.guard.screen import Finding, Guard, Screen, Verdict

__all__ = ["AuditLog", "Finding", "Guard", "Screen", "Verdict", "read_policy"]

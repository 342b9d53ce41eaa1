"""Which convention a reward function follows.

A function's parameters say for which library it was written (all rows that match count; two, or none, is an error):

| parameters | convention | call |
|---|---|---|
| ``solution_strs`` | ``verl_batch`` | once, plural lists |
| ``solution_str`` | ``verl`` | for each row |
| ``queries`` | ``openrlhf`` | for each row, with lists of one |
| ``completions`` or ``completion_ids`` | ``trl`` | once, lists |
| ``completions`` with ``states``, ``infos``, ``tasks`` | ``verifiers_group`` | once, lists |
| ``completion`` | ``verifiers`` | for each row, by name |
| two required ones, one of them a column | ``es`` (es-at-scale, NeMo-RL, metrics) | for each row, by name |

``prime`` (verl's positional ``(task, completion, reference, extra_info)``) looks like ``verifiers``, so one of the two
has to be chosen. The last row counts only where no other matches. ``trace`` and ``runtime`` belong to the methods of a
verifiers task (0.4 and later), which score a rollout of verifiers' own: refused.
"""

from __future__ import annotations

from mezo_lightning.rewarding.arguments import OFFERED, Parameters
from mezo_lightning.rewarding.conventions import (
    CONVENTIONS,
    TRL,
    Convention,
    OpenRLHF,
    OpenRLHFByPosition,
    Prime,
    TwoArguments,
    Verifiers,
    VerifiersGroup,
    Verl,
    VerlBatch,
    listed,
    unrecognised,
)

_TASK_METHOD = "a method of a verifiers task (0.4 and later)"
_ENVIRONMENTS = frozenset({"environments", "message_log_batch"})  # TRL, NeMo-RL
_TURN = frozenset({"observation", "action"})  # OpenRLHF's step; each may well be a column of somebody's data


def recognise(reward: str, parameters: Parameters, convention: str | None = None) -> Convention:
    """The convention that a function follows.

    Args:
        reward: The reward's name, for error messages.
        parameters: What the function takes.
        convention: The convention's name, where the user says it.

    Raises:
        ValueError: If none matches, or more than one, or the function is made for something else than one answer to
            one prompt.
    """
    if convention is not None:
        if convention not in CONVENTIONS:
            raise ValueError(f"convention={convention!r} is not known; use one of {', '.join(CONVENTIONS)}.")
        kind = CONVENTIONS[convention]
        if kind is OpenRLHF and "queries" not in parameters.wanted:
            kind = OpenRLHFByPosition
        return kind(reward, parameters, chosen=True)
    found = _candidates(parameters)
    needed = set(parameters.needed)
    if turns := (needed & _ENVIRONMENTS or (_TURN if not found and needed >= _TURN else None)):
        raise multi_turn(reward, f"it requires {listed(turns)}")
    if found == [_TASK_METHOD]:
        raise ValueError(
            f"Reward {reward} looks like {_TASK_METHOD}: it takes {listed(parameters.wanted)}, and there is no "
            "rollout of verifiers here. Write a function of prompt, completion and columns that makes the task of a "
            "row and calls the method with SimpleNamespace(last_reply=completion), or whatever it reads of a trace: "
            "docs/rewards.md (Functions) shows one. Or, if it is something else, set convention to one of "
            f"{', '.join(CONVENTIONS)}."
        )
    if len(found) > 1:
        raise ValueError(
            f"Reward {reward} takes {listed(parameters.wanted)}, which fits {' and '.join(found)}: set convention to "
            "the one that is meant."
        )
    if found:
        return CONVENTIONS[found[0]](reward, parameters)
    if len([name for name in parameters.needed if name not in OFFERED]) == 2:
        return TwoArguments(reward, parameters)
    raise ValueError(unrecognised(reward, parameters))


def makes_rewards(parameters: Parameters) -> bool:
    """Whether a function needs nothing any more and takes nothing of a row: then it is one that makes rewards."""
    return not parameters.needed and not _candidates(parameters)


def multi_turn(reward: str, why: str) -> ValueError:
    """The error for what belongs to an environment of several turns."""
    return ValueError(
        f"Reward {reward} belongs to an environment of several turns ({why}), and here a model gives one answer to "
        "one prompt: write a function that scores a finished completion."
    )


def _candidates(parameters: Parameters) -> list[str]:
    """Every convention whose names are among the parameters."""
    wanted, needed = parameters.wanted, set(parameters.needed)
    one, many = "completion" in wanted, "completions" in wanted
    of_task = bool(wanted & {"trace"} or needed & {"runtime"} or (needed & {"task"} and not (one or many)))
    open_ended = parameters.takes_all and not needed and wanted <= {*TRL.given, *OFFERED}
    table = {
        VerlBatch.name: "solution_strs" in wanted,
        Verl.name: "solution_str" in wanted,
        OpenRLHF.name: "queries" in wanted,
        _TASK_METHOD: of_task,
        TRL.name: many or "completion_ids" in wanted or open_ended,
        VerifiersGroup.name: many and bool(wanted & {"states", "infos", "tasks"}),
        Verifiers.name: one,
        Prime.name: wanted >= {"task", "completion", "reference"},
    }
    return [name for name, matches in table.items() if matches]

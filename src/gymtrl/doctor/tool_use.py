"""Rules about how tools are used after training."""

from __future__ import annotations

from gymtrl.doctor.change import (
    BEYOND,
    FEWEST_TASKS,
    POINTS,
    Change,
    ChangeRule,
    beyond_noise,
    grown,
    listed,
    more_of,
    shares_told,
)

FEWER_CALLS = 1.5


def _failing(change: Change) -> str | None:
    found = [shares_told(name, cost, "calls") for name, cost in grown(change, "failed calls")]
    known = {name for name, cost in change.measures("failed calls") if cost.tasks >= FEWEST_TASKS}
    calls = dict(change.measures("tool calls"))
    # A policy that hardly called before has no share of failures to set those of now against.
    for name, errors in change.measures("tool errors"):
        made = calls[name]
        before, after = (errors.before / made.before if made.before else 0.0), errors.after / (made.after or 1.0)
        if name not in known and after - before >= POINTS and beyond_noise(errors.difference):
            found.append(
                f"{name}: {made.before:.3g} calls a rollout before, {made.after:.3g} after, of which {after:.1%} fail"
            )
    return listed(found)


def _unused(change: Change) -> str | None:
    return listed(
        [
            f"{name}: {cost.before:.3g} calls a rollout before, {cost.after:.3g} after"
            for name, cost in change.measures("tool calls")
            if name not in change.improved()
            and cost.before >= FEWER_CALLS * cost.after
            and beyond_noise(cost.difference)
        ]
    )


TOOL_RULES = (
    ChangeRule(
        "calls_fail",
        "warning",
        "More calls fail",
        "Calls that tools answer with an error were trained on along with those that worked, or the arguments lost "
        "their form.",
        "Read a rollout that is named; leave out those that needed many attempts with 'gymtrl filter ... "
        "--max-tool-calls N', and train again",
        BEYOND,
        _failing,
    ),
    ChangeRule(
        "unknown_tools",
        "warning",
        "Tools are called that were not offered",
        "The training rows come from tasks with other tools, and their names were learned by heart.",
        "Train on rollouts of the environments that count, with 'gymtrl filter ... --agents NAME', and on several tool "
        "lists; rows with undeclared tools are kept by --keep-context only",
        BEYOND,
        more_of("unknown tools", what="calls of a rollout"),
    ),
    ChangeRule(
        "calls_as_text",
        "warning",
        "Calls stand in the text",
        "The policy writes calls in a form that the server's parser does not read, so no tool is called: the dataset "
        "was made with another template than the server has, or the parser is off.",
        "Serve with the template of the trained folder and the parser of its family; with vLLM, "
        "--enable-auto-tool-choice and --tool-call-parser. If they are right, make the dataset again",
        BEYOND,
        more_of("calls as text"),
    ),
    ChangeRule(
        "tools_unused",
        "warning",
        "Tools are called less",
        "Most training rows answer without tools, or the rows with calls were dropped.",
        "Keep rollouts with calls only, with 'gymtrl filter ... --require-tool-use', or give them a larger share; see "
        "what 'gymtrl format' dropped",
        f"ours: {FEWER_CALLS:g} times fewer, and beyond three standard errors; told where no improvement is shown",
        _unused,
    ),
)

"""Rules about how tools are used after training."""

from __future__ import annotations

from gymtrl.doctor.change import BEYOND, Change, ChangeRule, beyond_noise, listed, more_of

FEWER_CALLS = 1.5


def _unused(change: Change) -> str | None:
    return listed(
        [
            f"{name}: {cost.before:.3g} calls a rollout before, {cost.after:.3g} after"
            for name, cost in change.measures("tool calls")
            if cost.before >= FEWER_CALLS * cost.after and beyond_noise(cost.difference)
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
        more_of("failed calls", what="calls"),
    ),
    ChangeRule(
        "unknown_tools",
        "warning",
        "Tools are called that were not offered",
        "The training rows come from tasks with other tools, and their names were learned by heart.",
        "Train on rollouts of the environments that count, with 'gymtrl filter ... --agents NAME', and on several tool "
        "lists; rows with undeclared tools are kept by --keep-context only",
        BEYOND,
        more_of("unknown tools", what="calls"),
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
        f"ours: {FEWER_CALLS:g} times fewer, and beyond three standard errors",
        _unused,
    ),
)

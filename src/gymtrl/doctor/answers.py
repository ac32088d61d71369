"""Rules about what answers look like after training: form, length, ends, loops."""

from __future__ import annotations

from collections.abc import Callable

from gymtrl.comparison.measures import FORMS
from gymtrl.comparison.record import Cost
from gymtrl.doctor.change import BEYOND, Change, ChangeRule, beyond_noise, grown, listed, more_of, shares_told

OTHER_FORM = 0.2
OTHER_LENGTH = 1.3
RAN_ON = 0.5
"""A share of cut answers at which it is not the tasks that need long ones (ours)."""


def _unsound(change: Change) -> str | None:
    told = more_of("no sound chat")(change)
    if told is None:
        return None
    before, after = change.comparison.before.refused_by, change.candidate.after.refused_by
    reasons = sorted(after, key=lambda reason: before.get(reason, 0) - after[reason])
    named = ", ".join(
        f"{reason} {before.get(reason, 0):,} before and {after[reason]:,} after" for reason in reasons[:3]
    )
    return f"{told} ({named})"


def _form(change: Change) -> str | None:
    changed = [
        (abs(cost.difference.mean), shares_told(name, cost, "rollouts"))
        for name, cost in change.measures(*FORMS)
        if name not in change.improved() and abs(cost.difference.mean) >= OTHER_FORM and beyond_noise(cost.difference)
    ]
    return listed([words for _, words in sorted(changed, reverse=True)])


def _longer(change: Change) -> str | None:
    return _lengths(change, lambda ratio: ratio >= OTHER_LENGTH)


def _shorter(change: Change) -> str | None:
    return _lengths(change, lambda ratio: ratio <= 1 / OTHER_LENGTH)


def _lengths(change: Change, far: Callable[[float], bool]) -> str | None:
    # Characters where the tokens are not known, unless those that tools answered are among them.
    calling = {name for name, _ in change.measures("tool calls")}
    known: dict[str, Cost] = {n: cost for n, cost in change.measures("characters") if n not in calling}
    known |= dict(change.measures("output tokens"))
    return listed(
        [
            f"{name}: {cost.before:,.0f} {cost.name} a rollout before, {cost.after:,.0f} after"
            for name, cost in known.items()
            if cost.before and far(cost.after / cost.before) and beyond_noise(cost.difference)
        ]
    )


def _cut(change: Change) -> str | None:
    found = [one for one in grown(change, "truncated") if not _runs_on(one[1])]
    return listed([shares_told(name, cost, "rollouts") for name, cost in found])


def _no_end(change: Change) -> str | None:
    found = grown(change, "chat markers") + [one for one in grown(change, "truncated") if _runs_on(one[1])]
    return listed([shares_told(name, cost, "rollouts") for name, cost in found])


def _runs_on(cost: Cost) -> bool:
    return cost.after >= RAN_ON and cost.before <= cost.after / 2


ANSWER_RULES = (
    ChangeRule(
        "answers_unsound",
        "warning",
        "More answers are no sound chat",
        "The policy learned another form than the server reads, often calls whose arguments are no JSON or turns "
        "without content; such a rollout counts with its reward.",
        "See some with 'gymtrl inspect ROLLOUTS'; serve with the template and the tool-call parser that the dataset "
        "was made for, and train again with a lower --learning-rate",
        BEYOND,
        _unsound,
    ),
    ChangeRule(
        "answers_missing",
        "warning",
        "More rollouts end without an answer",
        "The last turn holds reasoning alone or nothing: the limit of tokens came first, or the dataset left out the "
        "answers that follow the reasoning.",
        "Look at the end of some rows with 'gymtrl format OBJECTIVE ... --show 3'; if the answers are there, collect "
        "with a higher --max-output-tokens",
        BEYOND,
        more_of("no answer"),
    ),
    ChangeRule(
        "format_drift",
        "warning",
        "Answers have another form",
        "The form of the training rows replaced the one that the prompt asks for; a verifier that looks for it scores "
        "a right answer 0.",
        "Compare the part of the reward that judges the form, such as with 'gymtrl compare ... --metric "
        "reward_components.format'; if it fell, train again on rows that have the form: 'gymtrl filter ... --where "
        '"reward_format = 1"\'',
        f"ours: by {OTHER_FORM * 100:g} points, and beyond three standard errors; told where no improvement is shown",
        _form,
    ),
    ChangeRule(
        "answers_longer",
        "note",
        "Answers are longer",
        "Good rows were longer than bad ones, or preference training went on for long; it favours length "
        "(arXiv:2403.19159).",
        "If the reward did not rise with it, leave out the longest rollouts with 'gymtrl filter ... "
        "--max-completion-chars N', or train with 'gymtrl train dpo ... --loss-type sigmoid_norm --beta 5'",
        f"ours: {OTHER_LENGTH:g} times as long, and beyond three standard errors",
        _longer,
    ),
    ChangeRule(
        "answers_shorter",
        "note",
        "Answers are shorter",
        "Long rollouts were left out of the data, or good rows were shorter than what the policy says by itself.",
        "If the reward fell with it, format again with a larger --max-length, and filter with --min-completion-chars",
        f"ours: {OTHER_LENGTH:g} times as short, and beyond three standard errors",
        _shorter,
    ),
    ChangeRule(
        "answers_cut",
        "warning",
        "More answers are cut off",
        "Answers became longer than the limit of tokens; an answer that is cut off seldom scores.",
        "Collect both sides again with a higher --max-output-tokens; if that changes nothing, train again without "
        "truncated and very long rollouts: 'gymtrl filter ... --max-completion-chars N'",
        BEYOND,
        _cut,
    ),
    ChangeRule(
        "turn_ends_missing",
        "warning",
        "The policy does not end its turns",
        "It goes on past its answer, up to the limit or with the next speaker's turn: the token that ends a turn "
        "carried no loss, or the server stops at another one than the template writes.",
        "See with 'gymtrl format OBJECTIVE ... --show 3' whether the end of each turn carries loss, and serve with the "
        "tokenizer, the template and the generation_config.json of the trained folder",
        f"{BEYOND}; cut answers where they are {RAN_ON:.0%} or more and twice as many",
        _no_end,
    ),
    ChangeRule(
        "loops",
        "warning",
        "More rollouts end in loops",
        "The policy says or calls the same again and again: too high a learning rate, too many passes over few rows, "
        "or training rows with loops.",
        "Train again with half of the --learning-rate or fewer --epochs, after 'gymtrl filter ... --max-repetition "
        "0.3'",
        BEYOND + "; three equal turns running, or an end of 40 characters that stands four times in its text",
        more_of("repeated text", "repeated turns"),
    ),
)

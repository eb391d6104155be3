"""What the numbers say, in sentences that are chosen by the numbers."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from eval_tasks.iso_quality import IsoQuality, NeededBudget
from eval_tasks.methods import DENSE, NC, find_method, without_choice
from eval_tasks.provenance import hardware_words
from eval_tasks.summary import Row, Summary, losses, title_of
from eval_tasks.verdicts import GAIN_NEEDED

GROWING = "nc-topk"
# The same with the means of the keys that it leaves out.
WITH_MEANS = "nc-topk-mean"
# A perplexity within this factor of dense is called equal.
_EQUAL_WITHIN = 1.02
# A share of dense attention's gain from the first copy: at least so much is called recall, at most so much none.
_RECALLS, _FORGETS = 0.8, 0.2
# Keys that differ from the budget by more than this share of it are named beside it.
_REALISED_WITHIN = 0.1
# What the times in a sentence are of, by phase: where the sparse part was timed apart, and where it was not.
_TIMED = {
    "all": "one forward pass over {length:,} tokens",
    "prefill": "the prefill within {length:,} tokens",
    "question": "the scored tokens, read at once after a dense prefill, within {length:,} tokens",
    "decode": "the scored tokens, read one by one after a dense prefill, within {length:,} tokens",
}
_TIMED_TOGETHER = {
    "all": _TIMED["all"],
    "prefill": "{length:,} tokens, a sparse prefill and the scored tokens, which are read densely, together",
    "question": "{length:,} tokens, a dense prefill and the scored tokens after it together",
    "decode": "{length:,} tokens, a dense prefill and the scored tokens one by one after it together",
}


class Findings:
    """Sentences about one sweep; every method returns whole sentences, or nothing where nothing was measured."""

    def __init__(self, run: Mapping[str, Any], rows: Sequence[Row], summaries: Sequence[Summary]) -> None:
        self.run = run
        self.rows = rows
        self.cells = {(s.task, s.length, s.method): s for s in summaries}

    def headline(self) -> list[str]:
        """The main finding in two or three sentences, at the longest length at which all methods were measured."""
        for task in ("recall", "perplexity"):
            length = self._longest(task)
            if length is not None:
                return [self._against_dense(task, length), *self._against_others(task, length)]
        return [
            "Dense attention was not measured beside a method that could be used on the same samples, so nothing is "
            "compared yet."
        ]

    def details(self) -> list[str]:
        """The other findings: plain perplexity, where sparse attention loses, what it costs in time, the caveats."""
        found: list[str] = []
        length = self._longest("perplexity")
        if length is not None and self._longest("recall") is not None:
            found.append(
                " ".join([self._against_dense("perplexity", length), *self._against_others("perplexity", length)])
            )
        return [*found, *self._losses(), *self._time(), *self.caveats()]

    def _longest(self, task: str) -> int | None:
        """The longest length at which every measured method of the task has the samples that dense has."""
        methods = {m for t, _, m in self.cells if t == task and not find_method(m).simulated}
        if DENSE not in methods or len(methods) < 2:
            return None
        complete = []
        for length in {length for cell_task, length, _ in self.cells if cell_task == task}:
            samples = {frozenset(losses(self.rows, task, length, method)) for method in methods}
            if len(samples) == 1 and next(iter(samples)):
                complete.append(length)
        return max(complete, default=None)

    def _leading(self, task: str, length: int) -> Summary:
        """The method that the finding is about: α·n^C top-k, or else the best of the sparse ones."""
        growing = self.cells.get((task, length, GROWING))
        return growing or min(self._sparse(task, length), key=lambda summary: summary.loss)

    def _sparse(self, task: str, length: int) -> list[Summary]:
        """The methods that could be used: neither dense nor simulated."""
        return [
            s
            for (t, n, m), s in self.cells.items()
            if t == task and n == length and m != DENSE and not find_method(m).simulated
        ]

    def _against_dense(self, task: str, length: int) -> str:
        dense, leading = self.cells[task, length, DENSE], self._leading(task, length)
        start = (
            f"At {length:,} tokens, {find_method(leading.method).title} attention reads "
            f"{_percent(leading.attended_fraction)} of the keys and reaches a {title_of(task)} of "
            f"{_number(leading.perplexity)}; dense attention, which reads all of them, {_number(dense.perplexity)}"
        )
        return f"{start} ({_ratio(leading)}{self._kept(task, length, leading)})."

    def _kept(self, task: str, length: int, summary: Summary) -> str:
        share = self._recalled(length, summary.method) if task == "recall" else None
        if share is None:
            return ""
        return f"; it keeps {_percent(share)} of what dense attention gains from having seen the passage"

    def _recalled(self, length: int, method: str) -> float | None:
        """The share of dense attention's gain from the first copy that a method keeps; None where that is small."""
        unseen = losses(self.rows, "unseen", length, DENSE)
        dense, own = losses(self.rows, "recall", length, DENSE), losses(self.rows, "recall", length, method)
        shared = unseen.keys() & dense.keys() & own.keys()
        if not shared:
            return None
        level, best, got = (fmean(values[sample] for sample in shared) for values in (unseen, dense, own))
        return None if level - best < GAIN_NEEDED else max(0.0, (level - got) / (level - best))

    def _against_others(self, task: str, length: int) -> list[str]:
        leading = self._leading(task, length)
        sentences = []
        means = self.cells.get((task, length, WITH_MEANS))
        if means is not None and leading.method == GROWING:
            sentences.append(
                f"With the means of the keys that it leaves out beside it, it reaches "
                f"{_number(means.perplexity)} ({_ratio(means)}{self._kept(task, length, means)})."
            )
        unasked = self.cells.get((task, length, NC))
        if unasked is not None and unasked != leading:
            sentences.append(
                f"With this budget patch_model, by blocks in prefill and top-k with means in decoding, reaches "
                f"{_number(unasked.perplexity)} ({_ratio(unasked)}{self._kept(task, length, unasked)})."
            )
        rivals = [s for s in self._sparse(task, length) if find_method(s.method).selects == "content" and s != leading]
        fixed = [s for s in rivals if not find_method(s.method).grows]
        if fixed and find_method(leading.method).grows:
            sentences.append(self._growth(task, length, leading, fixed))
        windows = [s for s in self._sparse(task, length) if find_method(s.method).selects == "recent" and s != leading]
        if windows:
            sentences.append(self._windows(task, length, windows))
        blocks = [s for s in rivals if s.method == "block"]
        if blocks:
            sentences.append(
                f"Whole blocks of keys ({_keys(blocks[0])}, {_percent(blocks[0].attended_fraction)} of all) give "
                f"{_number(blocks[0].perplexity)}."
            )
        return sentences

    def _growth(self, task: str, length: int, leading: Summary, fixed: list[Summary]) -> str:
        equal_at = int(self.run["identity"]["equal_at"])
        described = lambda s: f"{_keys(s)}, {_percent(s.attended_fraction)} of all"  # noqa: E731
        budgets = " and ".join(f"{find_method(s.method).title} {_number(s.perplexity)} ({described(s)})" for s in fixed)
        match = self.run["identity"].get("match", "deploy")
        if match == "scored" or (match == "deploy" and length == equal_at):
            return f"At this length all budgets are equal: {budgets}."
        own = losses(self.rows, task, length, leading.method)
        better = all(leading.loss < s.loss for s in fixed)
        worse = all(leading.loss > s.loss for s in fixed)
        verdict = "better than both" if better else "worse than both" if worse else "between or level with them"
        if len(fixed) == 1:
            verdict = "better" if better else "worse" if worse else "level"
        wins = sum(all(own[i] < losses(self.rows, task, length, s.method)[i] for s in fixed) for i in own)
        equal = f"equal its own at {equal_at:,} tokens but" if match == "deploy" else "equal its own in sum and"
        return (
            f"Budgets that {equal} do not grow as n^C reach: {budgets}; "
            f"the growing one ({described(leading)}) is {verdict}, and ahead in {wins} of {len(own)} samples."
        )

    def _windows(self, task: str, length: int, windows: list[Summary]) -> str:
        best = min(windows, key=lambda summary: summary.loss)
        what = (
            f"The best window, which keeps keys by position ({find_method(best.method).title}, {_keys(best)}), reaches "
        )
        share = self._recalled(length, best.method) if task == "recall" else None
        if share is None:
            return f"{what}{_number(best.perplexity)} ({_ratio(best)})."
        verdict = (
            "it does not recall the passage"
            if share <= _FORGETS
            else "it recalls the passage"
            if share >= _RECALLS
            else "it recalls a part of the passage"
        )
        return f"{what}{_number(best.perplexity)}: {verdict} ({_percent(share)} of dense attention's gain)."

    def _losses(self) -> list[str]:
        """Where the leading method is clearly above dense, and where a cheaper rule is as good or better."""
        worst: list[tuple[float, Summary]] = []
        for task in ("recall", "perplexity"):
            length = self._longest(task)
            if length is None:
                continue
            for n in sorted({n for t, n, _ in self.cells if t == task and n <= length}):
                own = self.cells.get((task, n, self._leading(task, length).method))
                if own is not None and own.perplexity_ratio is not None and own.perplexity_ratio > _EQUAL_WITHIN:
                    worst.append((own.perplexity_ratio, own))
        if not worst:
            return []
        listed = ", ".join(f"{title_of(s.task)} at {s.length:,} (+{100 * (ratio - 1):.1f} %)" for ratio, s in worst)
        return [f"Where {find_method(worst[0][1].method).title} is worse than dense by more than 2 %: {listed}."]

    def _time(self) -> list[str]:
        task = next((task for task in ("perplexity", "recall") if self._longest(task) is not None), None)
        if task is None or len(hardware_of(self.run)) > 1:
            return []
        length = self._longest(task)
        assert length is not None
        dense, others = self.cells[task, length, DENSE], self._sparse(task, length)
        apart = all(s.sparse_seconds is not None for s in (dense, *others) if s.seconds is not None)
        seconds_of = lambda s: s.sparse_seconds if apart else s.seconds  # noqa: E731
        whole = seconds_of(dense)
        if whole is None:
            return []
        times = ", ".join(
            f"{find_method(s.method).title} {seconds / whole:.2f}"
            for s in others
            if (seconds := seconds_of(s)) is not None
        )
        if not times:
            return []
        phase = self.run["identity"].get("phase", "all")
        what = (_TIMED if apart else _TIMED_TOGETHER)[phase].format(length=length)
        machine = self.run.get("hardware", {})
        where = machine.get("gpu") or f"{machine.get('threads')} threads of a {machine.get('processor')}"
        return [f"Time of {what}, as a multiple of dense ({whole:.2f} s), on {where}: {times}."]

    def caveats(self) -> list[str]:
        """What to keep in mind: few samples, lengths where dense fails, calls that ran dense, blocks nobody chose."""
        counts = sorted({s.samples for s in self.cells.values()})
        samples = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        caveats = [
            f"Every figure is a mean over {samples} stretches of one text ({self.run.get('text_origin')}); the "
            "intervals in the table resample these stretches, and with so few they are rough."
            if counts[0] < 10
            else f"Every figure is a mean over {samples} stretches of one text ({self.run.get('text_origin')})."
        ]
        failed = [
            f"{n:,}"
            for task, n, method in sorted(self.cells)
            if task == "recall" and method == DENSE and self._dense_fails(n)
        ]
        if failed:
            caveats.append(f"Dense attention itself recalls little at {', '.join(failed)}: judge no method there.")
        ran_dense = sorted({reason for row in self.rows for reason in row.get("ran_dense", {})})
        if ran_dense:
            caveats.append(f"Some calls of patched models ran dense: {'; '.join(ran_dense)}.")
        machines = hardware_of(self.run)
        if len(machines) > 1:
            caveats.append(
                f"Parts of this run were measured on different hardware ({'; '.join(machines)}): times and memory of "
                "different samples do not compare."
            )
        return [*caveats, *self._without_choice()]

    def _without_choice(self) -> list[str]:
        """Where the method ``block`` chose nothing, as a sentence."""
        identity = self.run["identity"]
        size, phase = int(identity.get("block_size", 32)), identity.get("phase", "all")
        budgets = {(method, n): s.budget for (_, n, method), s in self.cells.items()}
        return without_choice([(method, n, budget) for (method, n), budget in budgets.items()], size, phase)

    def _dense_fails(self, length: int) -> bool:
        unseen = self.cells.get(("unseen", length, DENSE))
        return unseen is not None and unseen.loss - self.cells["recall", length, DENSE].loss < GAIN_NEEDED


def hardware_of(run: Mapping[str, Any]) -> list[str]:
    """The different machines that a run was made on, in words; those of old runs may be unknown."""
    sessions = run.get("sessions", [])
    machines = [run.get("hardware"), *(session.get("hardware") for session in sessions)]
    machines += [machine for session in sessions for machine in session.get("other_hardware", [])]
    return list(dict.fromkeys(hardware_words(machine) for machine in machines if machine))


def answer_sentences(summaries: Sequence[Summary]) -> list[str]:
    """For each task of answers, what each method gets right at the longest length that dense was measured at."""
    sentences = []
    for task in dict.fromkeys(s.task for s in summaries if s.score is not None):
        own = [s for s in summaries if s.task == task]
        length = max((s.length for s in own if s.method == DENSE), default=None)
        cells = {s.method: s for s in own if s.length == length}
        others = [s for s in cells.values() if s.method != DENSE]
        if length is None or not others:
            continue
        listed = ", ".join(
            f"{find_method(s.method).title} {_percent(s.score or 0.0)} ({_percent(s.tail_attended_fraction)} of keys)"
            for s in others
        )
        sentences.append(
            f"In {title_of(task)} at {length:,} tokens dense attention gets {_percent(cells[DENSE].score or 0.0)} "
            f"right, {listed}; {cells[DENSE].samples} samples."
        )
    return sentences


def iso_sentences(found: Sequence[IsoQuality], within: float) -> list[str]:
    """What budgets each method needs, and which law they follow; empty where nothing of the kind was measured."""
    sentences = []
    for iso in found:
        reached = [n for n in iso.needed if n.keys is not None]
        what = f"To stay within {100 * within:g} % of dense in {title_of(iso.task)}, {find_method(iso.method).title}"
        if not reached:
            sentences.append(f"{what} needs more than any budget that was measured. {_censored(iso)}")
            continue
        keys = ", ".join(f"{'at most ' * n.at_most}{n.keys:.0f} of {n.length:,}" for n in reached if n.keys is not None)
        sentence = f"{what} needs {keys} keys"
        if len(reached) < len(iso.needed):
            beyond = ", ".join(f"{n.length:,}" for n in iso.needed if n.keys is None)
            sentence += f", and at {beyond} more than was measured"
        if iso.law is None:
            sentence += ". Too few lengths to fit a law to: it takes three whose budget is known on both sides"
        else:
            best = min(iso.law.errors, key=lambda law: iso.law.errors[law] if iso.law else 0.0)
            spread = iso.law.C_interval
            interval = f" (95 % interval {spread[0]:.2f} to {spread[1]:.2f})" if spread else ""
            sentence += (
                f": {iso.law.alpha:.3g}·n^{iso.law.C:.2f}{interval}. Of the three laws the {best} one predicts a "
                "length left out best"
            )
        sentences.append(" ".join(filter(None, [f"{sentence}.", _censored(iso)])))
    return sentences


def _censored(iso: IsoQuality) -> str:
    """At how many lengths the needed budget is known on one side alone; empty where there are none."""
    below = [n for n in iso.needed if n.at_most]
    above = [n for n in iso.needed if n.keys is None]
    sides = []
    if below:
        sides.append(f"at {len(below)} the smallest measured budget is enough already ({_lengths(below)})")
    if above:
        sides.append(f"at {len(above)} the largest is not enough ({_lengths(above)})")
    if not sides:
        return ""
    many = f"{len(below) + len(above)} of {len(iso.needed)}"
    return f"At {many} lengths the budget is known on one side alone, and they enter no law: {'; '.join(sides)}."


def _lengths(needed: Sequence[NeededBudget]) -> str:
    return ", ".join(f"{n.length:,}" for n in needed)


def _keys(summary: Summary) -> str:
    """The keys of a budget, and those that were really attended at the scored positions where these differ."""
    realised = summary.tail_mean_keys
    if realised is None or abs(realised - summary.budget) <= _REALISED_WITHIN * summary.budget:
        return f"{summary.budget} keys"
    return f"{summary.budget} keys by its law, {realised:.0f} attended"


def _ratio(summary: Summary) -> str:
    ratio = summary.perplexity_ratio
    if ratio is None:
        return "not compared"
    if 1 / _EQUAL_WITHIN <= ratio <= _EQUAL_WITHIN:
        return f"equal within {100 * (_EQUAL_WITHIN - 1):.0f} %"
    if ratio >= 2:
        return f"{ratio:.1f} times dense"
    return f"{100 * abs(ratio - 1):.1f} % {'above' if ratio > 1 else 'below'} dense"


def _number(value: float | None) -> str:
    if value is None:
        return "no perplexity"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"

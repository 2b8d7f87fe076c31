"""What structure a matrix is pruned to, and how far."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from . import masks
from .masks import Density, Scope, Score


class Rule:
    """Candidates of a matrix, how they are scored, and which of them live at a density on the way to the final one."""

    score: Any = "max"
    unit: ClassVar[str] = "weights"  # what the candidates are, in a summary
    monotone: Any = True  # whether what was dropped stays dropped
    together: bool = False  # whether all matrices of this rule compete with each other

    @property
    def final(self) -> Density:
        """The density in the end (of `Threshold`: the threshold)."""
        raise NotImplementedError

    def candidates(self, rows: int, columns: int, gates: int) -> Tensor:
        """Places (groups, n, size) of the candidates' weights, as in `masks`. ValueError for a matrix that does not fit."""
        raise NotImplementedError

    def scores(self, weight: Tensor, at: Tensor, within: Tensor | None = None) -> Tensor:
        """Scores (groups, n) of the candidates of a matrix; −inf for what has died in the mask `within`."""
        return masks.scores(weight, at, self.score, within)

    def choose(
        self, scores: Sequence[Tensor], ats: Sequence[Tensor], columns: Sequence[int], value: Density
    ) -> list[Tensor]:
        """Which candidates (groups, n) of each matrix, which has so many columns, are kept at the density `value`."""
        raise NotImplementedError

    def always(self, rows: int, columns: int, gates: int) -> Tensor | None:
        """Mask of weights that are no candidate and always kept, or None."""
        return None

    def advice(self, rows: int, columns: int) -> str | None:
        """What to tell the user about a gate of this size, or None."""
        return None

    def mask(
        self, weight: Tensor, gates: int = 1, value: Density | None = None, within: Tensor | None = None
    ) -> Tensor:
        """The mask of one matrix, a pure function: weight (R, C) -> bool (R, C).

        `value` is a density on the way, None the final one. `within` is an earlier mask: what it dropped stays dropped.
        Errors: ValueError for a NaN weight, an axis too many, or rows that the gates do not divide.
        """
        if weight.dim() != 2:
            raise ValueError(f"a mask is drawn for a matrix, got shape {tuple(weight.shape)}.")
        if within is not None and within.shape != weight.shape:
            raise ValueError(f"the earlier mask has shape {tuple(within.shape)}, the weight {tuple(weight.shape)}.")
        at = self.candidates(weight.shape[0], weight.shape[1], gates).to(weight.device)
        value = self.final if value is None else value
        (kept,) = self.choose([self.scores(weight, at, within)], [at], [weight.shape[1]], value)
        mask = self.spread(kept, at, weight.shape, gates)
        return mask if within is None else mask & within

    def spread(self, kept: Tensor, at: Tensor, shape: torch.Size, gates: int) -> Tensor:
        """The mask (R, C) of the kept candidates, with what is always kept."""
        mask = masks.spread(kept, at, shape)
        always = self.always(shape[0], shape[1], gates)
        return mask if always is None else mask | always.to(mask.device)


class _Ranked(Rule):
    """Blocks of largest score, counted exactly: what `Magnitude` and `Block` share."""

    density: Any
    block: Any
    scope: Any
    keep_diagonal: Any

    @property
    def final(self) -> Density:
        """The density in the end."""
        density: Density = self.density
        return density

    def _check(self) -> None:
        _check_density(self.density)
        _one_of("scope", self.scope, get_args(Scope))
        if isinstance(self.density, tuple) and self.scope != "gate":
            raise ValueError(f"a density for each gate needs scope='gate', got {self.scope!r}.")

    @property
    def together(self) -> bool:  # type: ignore[override]
        """With scope="global"."""
        return bool(self.scope == "global")

    def candidates(self, rows: int, columns: int, gates: int) -> Tensor:
        """Blocks of each gate."""
        if isinstance(self.density, tuple) and len(self.density) != gates:
            raise ValueError(
                f"{len(self.density)} densities are given, this matrix has {gates} gates. Give one for each."
            )
        if self.keep_diagonal and rows != gates * columns:
            raise ValueError(
                f"only square gates have a diagonal to keep, these are {rows // gates} x {columns}. "
                "Narrow the pattern to recurrent matrices, for example '*weight_hh*'."
            )
        return masks.blocks(rows, columns, gates, self.block, self.keep_diagonal)

    def choose(
        self, scores: Sequence[Tensor], ats: Sequence[Tensor], columns: Sequence[int], value: Density
    ) -> list[Tensor]:
        """⌈density · n⌉ of each gate, each matrix, or all together."""
        return masks.densest(scores, [(at >= 0).any(-1) for at in ats], value, self.scope)

    def always(self, rows: int, columns: int, gates: int) -> Tensor | None:
        """The diagonal of each gate, with `keep_diagonal`."""
        return torch.eye(columns, dtype=torch.bool).repeat(gates, 1) if self.keep_diagonal else None


@dataclass(frozen=True)
class Magnitude(_Ranked):
    """Single weights of largest magnitude: the unstructured case of `Block`, whose other arguments it shares."""

    density: Density
    scope: Scope = "gate"
    keep_diagonal: bool = False

    block = (1, 1)

    def __post_init__(self) -> None:
        """Refuse what no mask could be drawn for."""
        self._check()


@dataclass(frozen=True)
class Block(_Ranked):
    """Blocks (rows, cols) = (outputs, inputs) of largest score.

    Args:
        density: share kept, exactly ⌈density · n⌉ of n blocks; a tuple gives each gate its own.
        block: (rows, cols), counted from the first row of each gate; those at an edge may be short.
        scope: who competes: the blocks of a "gate", of a "matrix", or of all matrices that have this rule ("global").
        score: largest |w| ("max"), mean |w| ("l1") or mean w² ("l2", the energy) over the elements that a block has.
        keep_diagonal: keep the diagonal of each gate of a recurrent matrix on top; it counts in no score and no density.
    """

    density: Density
    block: tuple[int, int] = (16, 1)
    scope: Scope = "gate"
    score: Score = "l2"
    keep_diagonal: bool = False

    unit: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        """Refuse what no mask could be drawn for."""
        self._check()
        _check_block(self.block)
        _one_of("score", self.score, get_args(Score))

    def advice(self, rows: int, columns: int) -> str | None:
        """A sentence where the block does not divide the gate, naming the next size that it divides."""
        return _advice(("rows per gate", rows, self.block[0]), ("columns", columns, self.block[1]))


class Weighted(Rule):
    """Another rule, in whose scores each row of the weight (R, C) is taken `rows` (R,) times as large.

    What a weight does to the loss is not its size alone. In a decoder a change δ of the logit of a word costs p (1 - p) δ² / 2 to
    second order, so that with its word's frequency p a weight counts as p w², or |w| √p: pass the root of the frequencies.

    Source of the criterion: LeCun, Denker and Solla (1990), Optimal brain damage.
    """

    def __init__(self, rule: Rule, rows: Tensor) -> None:
        self.rule, self.rows = rule, rows
        self.score, self.monotone, self.together, self.unit = rule.score, rule.monotone, rule.together, rule.unit  # type: ignore[misc]

    @property
    def final(self) -> Density:
        """The density in the end."""
        return self.rule.final

    def candidates(self, rows: int, columns: int, gates: int) -> Tensor:
        """Those of the other rule. ValueError where there is not a factor for each row."""
        if self.rows.shape != (rows,):
            raise ValueError(f"a factor for each of {rows} rows is needed, got shape {tuple(self.rows.shape)}.")
        return self.rule.candidates(rows, columns, gates)

    def scores(self, weight: Tensor, at: Tensor, within: Tensor | None = None) -> Tensor:
        """Those of the other rule, of the weight times `rows`."""
        return self.rule.scores(weight * self.rows.to(weight)[:, None], at, within)

    def choose(
        self, scores: Sequence[Tensor], ats: Sequence[Tensor], columns: Sequence[int], value: Density
    ) -> list[Tensor]:
        """As the other rule."""
        return self.rule.choose(scores, ats, columns, value)

    def always(self, rows: int, columns: int, gates: int) -> Tensor | None:
        """As the other rule."""
        return self.rule.always(rows, columns, gates)

    def advice(self, rows: int, columns: int) -> str | None:
        """As the other rule."""
        return self.rule.advice(rows, columns)


@dataclass(frozen=True)
class NM(Rule):
    """Of every m neighbouring inputs of a row the n of largest |w|; of a short last group at most n. Density n / m.

    At a density d on the way ⌈d · m⌉ of each m are kept, at least n.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse what no mask could be drawn for."""
        if not 0 <= self.n <= self.m or self.m < 1:
            raise ValueError(f"of every m inputs n are kept, 0 <= n <= m and m >= 1, got n={self.n}, m={self.m}.")

    @property
    def final(self) -> float:
        """The share n / m."""
        return self.n / self.m

    def candidates(self, rows: int, columns: int, gates: int) -> Tensor:
        """Weights of m neighbouring inputs of a row."""
        return masks.inputs_of_a_row(rows, columns, self.m)

    def choose(
        self, scores: Sequence[Tensor], ats: Sequence[Tensor], columns: Sequence[int], value: Density
    ) -> list[Tensor]:
        """⌈d · m⌉ of each group."""
        keep = max(self.n, masks.count(_single(value), self.m))
        return [masks.best(s, keep) for s in scores]

    def advice(self, rows: int, columns: int) -> str | None:
        """A sentence where m does not divide the columns."""
        return _advice(("columns", columns, self.m))


@dataclass(frozen=True)
class ColumnBalanced(Rule):
    """Of every column of a gate the share `density` of largest mean |w|, ⌈density · n⌉ of its n groups of `group` rows.

    Every input then costs the same, whichever unit speaks.
    """

    density: float
    group: int = 1

    score = "l1"
    unit: ClassVar[str] = "groups"

    def __post_init__(self) -> None:
        """Refuse what no mask could be drawn for."""
        _check_density(self.density)
        _at_least_one("group", self.group)

    @property
    def final(self) -> float:
        """The density in the end."""
        return self.density

    def candidates(self, rows: int, columns: int, gates: int) -> Tensor:
        """Groups of rows in a column."""
        return masks.groups_of_a_column(rows, columns, gates, self.group)

    def choose(
        self, scores: Sequence[Tensor], ats: Sequence[Tensor], columns: Sequence[int], value: Density
    ) -> list[Tensor]:
        """The same number in every column."""
        return [masks.best(s, masks.count(_single(value), s.shape[1])) for s in scores]

    def advice(self, rows: int, columns: int) -> str | None:
        """A sentence where the group does not divide the gate."""
        return _advice(("rows per gate", rows, self.group))


@dataclass(frozen=True)
class Complementary(Rule):
    """`overlay` = k groups of `group` rows form a set, and in every column one of them lives: density 1 / k, packed as one dense.

    Group q of set s is rows (q S + s) g … of a gate padded to R' = S k g rows. At a density d on the way the best ⌈d · k⌉ groups
    of every column of a set live.

    Args:
        overlay: k, groups of a set.
        group: g, rows of a group.
        sets: made of rows of one "gate"; or of one "unit", the rows of its gates: k is then their number, or a multiple.
        choice: "magnitude", in each column the group of largest Σ|w|, all that can be kept; "balanced", the assignment that keeps
            most while every group of a set owns as many columns as the others, give or take one; "random", columns dealt to the
            groups of a set in random order; "permuted", group (j + φ) mod k lives in column j, with a random φ for every set and
            every k columns. The last two look at no weight.
        seed: of the random choices; matrices of one shape with one seed are dealt alike.

    Source: Hunter, Spracklen and Ahmad (2022), arXiv 2112.13896; "permuted" is the rule of permuted diagonal matrices.
    """

    overlay: int
    group: int = 1
    sets: Literal["gate", "unit"] = "gate"
    choice: Literal["magnitude", "balanced", "random", "permuted"] = "magnitude"
    seed: int = 0

    score = "sum"
    unit: ClassVar[str] = "groups"

    def __post_init__(self) -> None:
        """Refuse what no mask could be drawn for."""
        _at_least_one("overlay", self.overlay)
        _at_least_one("group", self.group)
        _one_of("sets", self.sets, ("gate", "unit"))
        _one_of("choice", self.choice, ("magnitude", "balanced", "random", "permuted"))

    @property
    def final(self) -> float:
        """1 / k."""
        return 1 / self.overlay

    def candidates(self, rows: int, columns: int, gates: int) -> Tensor:
        """Groups of a set in a column. In a matrix taken as one gate, those of a unit lie a gate's rows apart."""
        if self.sets == "unit" and (self.overlay % gates or rows % (self.overlay * self.group)):
            raise ValueError(
                f"sets of one unit's gates need an overlay that is a multiple of the {gates} gates, and "
                f"overlay x group = {self.overlay * self.group} to divide the {rows} rows."
            )
        return masks.complementary(rows, columns, 1 if self.sets == "unit" else gates, self.overlay, self.group)

    def choose(
        self, scores: Sequence[Tensor], ats: Sequence[Tensor], columns: Sequence[int], value: Density
    ) -> list[Tensor]:
        """⌈d · k⌉ groups of each column of a set."""
        keep = max(1, masks.count(_single(value), self.overlay))
        return [self._chosen(s, n, keep) for s, n in zip(scores, columns, strict=True)]

    def _chosen(self, scores: Tensor, columns: int, keep: int) -> Tensor:
        if self.choice == "magnitude" or not scores.numel() or (self.choice == "balanced" and keep > 1):
            return masks.best(scores, keep)
        by_set = scores.view(-1, columns, self.overlay)
        if self.choice == "balanced":
            return masks.balanced(by_set).view_as(scores)
        owner = self._dealt(len(by_set), columns).to(scores.device)
        behind = (torch.arange(self.overlay, device=scores.device) - owner[..., None]) % self.overlay
        return masks.best(torch.where(by_set > -math.inf, -behind.double(), -math.inf).view_as(scores), keep)

    def _dealt(self, sets: int, columns: int) -> Tensor:
        """Which group (sets, columns) lives, by chance alone."""
        random, k = torch.Generator().manual_seed(self.seed), self.overlay
        if self.choice == "random":
            order = torch.rand(sets, columns, generator=random).argsort(1)
            return torch.empty_like(order).scatter_(1, order, (torch.arange(columns) % k).expand(sets, -1))
        shift = torch.randint(k, (sets, -(-columns // k)), generator=random).repeat_interleave(k, 1)[:, :columns]
        return (torch.arange(columns) + shift) % k

    def advice(self, rows: int, columns: int) -> str | None:
        """A sentence where the sets are not full."""
        return None if self.sets == "unit" else _advice(("rows per gate", rows, self.overlay * self.group))


@dataclass(frozen=True)
class Threshold(Rule):
    """Blocks whose largest |w| reaches a rising threshold, in the end q · (rows · cols)^¼: not exact, but the paper's form.

    Goes with the schedule `TwoSlopes`. The density it arrives at is what `Pruner.density` says; blocks of i.i.d. Gaussian
    weights would be pruned to 2 % and less. Prefer `Block` with `Cubic`, which reach what is asked for.

    Args:
        q: a high quantile of |w| in an already trained dense model; `thresholds` takes it from one.
        block: (rows, cols); (1, 1) are single weights.
        monotone: what was dropped stays dropped; False: blocks are judged anew each time, by the weights as they then are.

    Source: Narang et al. (2017), arXiv 1704.05119 (weights) and 1711.02782 (blocks). Patented: see docs/pruning.md.
    """

    q: float
    block: tuple[int, int] = (1, 1)
    monotone: bool = True

    unit: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        """Refuse what is no threshold."""
        if not (math.isfinite(self.q) and self.q >= 0):
            raise ValueError(f"q is a quantile of |w|, finite and >= 0, got {self.q}.")
        _check_block(self.block)

    @property
    def final(self) -> float:
        """The threshold q · N^¼, N weights of a block."""
        return float(self.q * (self.block[0] * self.block[1]) ** 0.25)

    def candidates(self, rows: int, columns: int, gates: int) -> Tensor:
        """Blocks."""
        return masks.blocks(rows, columns, gates, self.block)

    def choose(
        self, scores: Sequence[Tensor], ats: Sequence[Tensor], columns: Sequence[int], value: Density
    ) -> list[Tensor]:
        """Blocks whose score reaches the threshold `value`."""
        return [s >= _single(value) for s in scores]


def thresholds(
    trained: torch.nn.Module, patterns: Sequence[str], block: tuple[int, int] = (1, 1), share: float = 0.9
) -> dict[str, Rule]:
    """Rules `Threshold` for every matrix of a trained dense model that a pattern matches, q the quantile `share` of its |w|."""
    _check_density(share)
    rules: dict[str, Rule] = {}
    for name, p in trained.named_parameters():
        if p.dim() >= 2 and any(fnmatchcase(name, pattern) for pattern in patterns):
            ranked = p.detach().abs().flatten().double().sort().values  # torch.quantile stops at 2^24 weights
            rules[name] = Threshold(float(ranked[round(share * (len(ranked) - 1))]), block)
    if not rules:
        raise ValueError(f"no matrix is named {' or '.join(map(repr, patterns))}.")
    return rules


# Rules as a file names them.
RULES: dict[str, type[Rule]] = {
    "magnitude": Magnitude,
    "block": Block,
    "nm": NM,
    "column_balanced": ColumnBalanced,
    "complementary": Complementary,
}


def read_rules(table: Mapping[str, Any]) -> dict[str, Rule]:
    """Rules from {pattern: {"rule": name, argument: value, …}}, as a TOML or JSON file holds them.

    Errors: ValueError for an unknown rule or argument (near ones are named), a missing one, or a value that does not fit.
    """
    if not table:
        raise ValueError("there is no rule. Write one table for each pattern of parameter names.")
    return {pattern: _read_rule(pattern, entry) for pattern, entry in table.items()}


def _read_rule(pattern: str, entry: Any) -> Rule:
    names = ", ".join(RULES)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("rule"), str):
        raise ValueError(f"the entry of {pattern!r} is a table with rule = one of {names}.")
    if (cls := RULES.get(entry["rule"])) is None:
        near = difflib.get_close_matches(entry["rule"], RULES, n=1)
        raise ValueError(
            f"{pattern!r} names an unknown rule {entry['rule']!r}. "
            + (f"Did you mean {near[0]!r}?" if near else f"Rules: {names}.")
        )
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "rule"}
    if unknown := set(given) - set(known):
        raise ValueError(
            f"{pattern!r}: {entry['rule']} has no argument {sorted(unknown)[0]!r}. Arguments: {', '.join(known)}."
        )
    if missing := [name for name, f in known.items() if f.default is MISSING and name not in given]:
        raise ValueError(f"{pattern!r}: {entry['rule']} needs {', '.join(missing)}.")
    hints = get_type_hints(cls)
    for name, value in given.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{pattern!r}: {name} must be {_words(hints[name])}, got {entry[name]!r}.")
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{pattern!r}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return value in arguments
    if get_origin(hint) is tuple:
        items = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_fits, value, items))
    if arguments:  # a union
        return any(_fits(value, kind) for kind in arguments)
    return isinstance(value, (int, float) if hint is float else hint) and isinstance(value, bool) == (hint is bool)


def _words(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if get_origin(hint) is tuple:
        return "a list of numbers" if arguments[-1] is ... else f"a list of {len(arguments)} whole numbers"
    return {float: "a number", int: "a whole number", bool: "true or false"}.get(hint) or " or ".join(
        map(_words, arguments)
    )


def magnitude_mask(
    weight: Tensor, density: float, gates: int = 1, scope: Scope = "gate", within: Tensor | None = None
) -> Tensor:
    """The mask of `Magnitude` for one matrix: weight (R, C) -> bool (R, C), as `Rule.mask` says."""
    _one_of("scope", scope, ("gate", "matrix"))
    return Magnitude(density, scope).mask(weight, gates, within=within)


def block_mask(
    weight: Tensor,
    density: float,
    block: tuple[int, int],
    gates: int = 1,
    scope: Scope = "gate",
    within: Tensor | None = None,
) -> Tensor:
    """The mask of `Block` for one matrix: weight (R, C) -> bool (R, C), as `Rule.mask` says."""
    _one_of("scope", scope, ("gate", "matrix"))
    return Block(density, block, scope).mask(weight, gates, within=within)


def _single(value: Density) -> float:
    return value[0] if isinstance(value, tuple) else value


def _check_density(density: Density) -> None:
    for share in density if isinstance(density, tuple) else (density,):
        if not 0 <= share <= 1:
            raise ValueError(f"density is the share of weights kept, in [0, 1], got {density}.")


def _check_block(block: tuple[int, int]) -> None:
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"a block is (rows, cols), each at least 1, got {block}.")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is at least 1, got {value}.")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        *some, last = map(repr, choices)
        raise ValueError(f"{name} is {', '.join(some)} or {last}, got {value!r}.")


def _advice(*axes: tuple[str, int, int]) -> str | None:
    notes = [
        f"{size} {axis} are no multiple of {step}, so the last {'blocks are' if axis != 'columns' else 'are'} short; "
        f"{-(-size // step) * step} would be"
        for axis, size, step in axes
        if size % step
    ]
    return "; ".join(notes) + "." if notes else None

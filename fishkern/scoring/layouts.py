"""Where each input of a forward pass has its samples: found by shape, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fishkern.batches.packing import Packing
from fishkern.interception import Site, elementwise
from fishkern.interception.put_in import Use
from fishkern.scoring.choices import Choice, KnownChoices, Shape

#: Where a batch says how many tokens a sample has: see ``samples.token_counts``.
Place = tuple[int, int]


class Layout(NamedTuple):
    """Where a module's input has its samples: an axis of length N, or N * T, sample by sample.

    In packed batches it has them at the front, in ``[B, T]``, which is trusted if a sample alone
    brings ``[1, its length]`` there.

    The shape alone cannot tell N * T from a list of tokens gathered from all samples (padding
    left out, tokens routed to an expert), so N * T is trusted only

    - in the first batch, if each sample alone brings the same share (and N, too, in a model that
      has such lists);
    - in a later batch, if the share is what a tensor of the batch says at one of the ``places``
      where it did in the first batch (``[N, T, ...]`` says T): with padding left out, N * T
      tokens are all of them. Otherwise each sample is asked again.

    N alone is a list, too. Where the input is ``bare``, without an axis for tokens, it is doubted
    in a later batch if samples had one token each in the first, or if the model gathers tokens
    anywhere. And whatever its shape, it is doubted in a batch whose values chose other numbers of
    rows from one sample than from another (``choices.py``) before the input was made, unless one of
    the ``token_axes`` is as long as the batch says at one of the ``places``.
    """

    axis: int
    flattened: bool
    places: frozenset[Place] = frozenset()
    dims: int | None = None
    token_axes: tuple[int, ...] = ()

    @property
    def bare(self) -> bool:
        """Whether a sample has one row, without an axis for tokens."""
        return not self.flattened and not self.token_axes


@dataclass
class Noted:
    """What a forward pass did: its inputs' shapes, and its choices of rows."""

    calls: dict[Site, list[Shape]] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    #: How many choices there were before a site's last input.
    before: dict[Site, int] = field(default_factory=dict)


class Layouts:
    """The inputs of a batch's forward pass, and the layout of each.

    Layouts are kept from batch to batch, call by call.
    """

    def __init__(self) -> None:
        self.gathers = False  # whether the model was seen to gather tokens into lists
        self._known: dict[Site, list[Layout | None]] = {}
        self._constant: dict[Site, bool] = {}
        self._choices = KnownChoices()
        self.begin(None)

    def begin(self, packing: Packing | None) -> None:
        """A batch begins. ``packing``: how its samples are packed, if they are."""
        self.num_samples = 0
        self.packing = packing
        self.in_forward = self._recording = True
        self._noted = Noted()
        self._by_shape: dict[tuple[Site, Shape], Layout | None] = {}

    def note(self, site: Site, shape: Shape) -> bool:
        """Note an input of the forward pass; whether it counts.

        Those that checkpointing computes again are not noted, those of passes aside do not count.
        """
        if self.in_forward:
            self._noted.calls.setdefault(site, []).append(shape)
            self._noted.before[site] = len(self._noted.choices)
        return self.in_forward and self._recording

    def note_choice(self, choice: Choice) -> None:
        """Note where values decide how many rows there are."""
        if self.in_forward:
            self._noted.choices.append(choice)

    def forget_calls(self) -> None:
        """The forward pass starts again."""
        self._noted = Noted()

    @contextmanager
    def aside(self) -> Iterator[Noted]:
        """What is noted of a pass in between, which does not count."""
        before = self._noted, self.in_forward, self._recording
        self._noted, self.in_forward, self._recording = Noted(), True, False
        try:
            yield self._noted
        finally:
            self._noted, self.in_forward, self._recording = before

    def of(self, site: Site, shape: Shape) -> Layout | None:
        """The layout of an input of this shape; None where it has no axis of samples."""
        return self._by_shape.get((site, shape))

    def is_constant(self, site: Site) -> bool:
        """Whether the site's inputs are of the same shape for any number of samples."""
        return self._constant.get(site, False)

    def end_forward(
        self,
        num_samples: int,
        first: Noted | None,
        alone: Callable[[int], Noted],
        token_counts: Mapping[Place, int],
    ) -> None:
        """Find every input's sample axis, by the shapes of one-sample passes or known layouts.

        Args:
            num_samples: N.
            first: What was noted of the first sample alone; None: layouts are known.
            alone: The same of any sample.
            token_counts: How many tokens a sample of this batch can have, by place.
        """
        self.in_forward, self.num_samples = False, num_samples
        noted, ones = self._noted, None if first is None else first.calls
        if self.packing is not None and num_samples > 1:
            self._find_packed(self.packing, ones)
            return
        if first is not None and ones is not None:
            self._choices.learn(first.choices, noted.choices, num_samples)
            self._find_layouts(ones, token_counts)
            ragged = any(self._is_ragged(site, ones.get(site, [])) for site in noted.calls)
        else:
            ragged = any(site not in self._known or self._misfits(site) for site in noted.calls)
        self.gathers = self.gathers or (num_samples > 1 and ragged)
        uneven = self._choices.first_uneven(noted.choices, num_samples)
        doubtful = {
            site
            for site, shapes in noted.calls.items()
            for layout, shape in zip(self._known.get(site, []), shapes, strict=False)
            if num_samples > 1
            and layout is not None
            and not (
                _is_certain(layout, shape, num_samples, token_counts)
                and not (layout.bare and self.gathers)
                and not (noted.before[site] > uneven and _may_be_list(layout, shape, token_counts))
            )
        }
        self.gathers = self.gathers or any(
            layout is not None and layout.flattened
            for site in doubtful
            for layout in self._known[site]
        )
        if ones is not None and any(self._casts_doubt(site, ones) for site in noted.calls):
            doubtful = set(noted.calls)  # lists of tokens may also hold one of each by chance
        if doubtful:
            shares = [alone(n).calls for n in range(num_samples)]
            for site in doubtful:
                self._known[site] = _confirmed(
                    self._known[site], noted.calls[site], [calls.get(site, []) for calls in shares]
                )
        for site, shapes in noted.calls.items():
            known = self._known.get(site, [])
            for call, shape in enumerate(shapes):
                layout = known[call] if len(known) == len(shapes) else None
                if num_samples == 1:
                    layout = Layout(0, True)  # whatever the shape: all of it is the one sample
                elif layout is not None and not layout_fits(layout, shape, num_samples):
                    layout = None
                if self._by_shape.setdefault((site, shape), layout) != layout:
                    self._by_shape[site, shape] = None

    def _is_ragged(self, site: Site, ones: Sequence[Shape]) -> bool:
        """Whether the site's inputs grow with the number of samples, but not as N times one's."""
        layouts, shapes = self._known[site], self._noted.calls[site]
        return not len(layouts) == len(ones) == len(shapes) or any(
            layout is None and one != shape
            for layout, one, shape in zip(layouts, ones, shapes, strict=True)
        )

    def _misfits(self, site: Site) -> bool:
        """Whether the site's inputs cannot have the layouts that they had."""
        known, shapes = self._known[site], self._noted.calls[site]
        return None not in known and (
            len(known) != len(shapes)
            or any(
                layout is not None and not layout_fits(layout, shape, self.num_samples)
                for layout, shape in zip(known, shapes, strict=True)
            )
        )

    def _find_packed(self, packing: Packing, first: Mapping[Site, list[Shape]] | None) -> None:
        layout = Layout(0, flattened=False)
        for site, shapes in self._noted.calls.items():
            dims = site.rule.input_dims(site.module)
            if first is not None:
                self._known[site] = [
                    layout if packing.is_first(one) and one[2:] == shape[2:] else None
                    for one, shape in zip(first.get(site, []), shapes, strict=False)
                ]
            known = self._known.get(site, [])
            for call, shape in enumerate(shapes):
                fits = dims is not None and packing.fits(shape[: len(shape) - dims])
                found = known[call] if fits and len(known) == len(shapes) else None
                if self._by_shape.setdefault((site, shape), found) != found:
                    self._by_shape[site, shape] = None

    def _casts_doubt(self, site: Site, first: Mapping[Site, list[Shape]]) -> bool:
        """Whether some input of the site may be a list of tokens gathered from all samples.

        One that is the same for any number of samples is none: a parameter in its own shape, or a
        matrix (DoRA puts an identity through its adapters) given to a layer whose other inputs
        have an axis for the samples and one for the tokens.
        """
        layouts, shapes, ones = self._known[site], self._noted.calls[site], first.get(site, [])
        if any(layout is not None and layout.flattened for layout in layouts):
            return True
        dims = site.rule.input_dims(site.module) or 0
        constant = site.rule is elementwise.RULE or any(
            layout is not None and (layout.dims or 0) > dims + 1 for layout in layouts
        )
        if not len(layouts) == len(ones) == len(shapes) or not constant:
            return None in layouts
        return any(
            layout is None and shape != one
            for layout, shape, one in zip(layouts, shapes, ones, strict=True)
        )

    def _find_layouts(
        self, first: Mapping[Site, list[Shape]], token_counts: Mapping[Place, int]
    ) -> None:
        for site, shapes in self._noted.calls.items():
            dims, ones = site.rule.input_dims(site.module), first.get(site, [])
            unknown = site.rule is elementwise.RULE
            same_calls = len(ones) == len(shapes)
            self._constant[site] = list(ones) == shapes
            self._known[site] = (
                [
                    find_layout(one, shape, self.num_samples, dims, token_counts, unknown)
                    for one, shape in zip(ones, shapes, strict=True)
                ]
                if same_calls
                else [None]
            )

    # In the backward pass

    def samples_first(
        self,
        layout: Layout,
        tensor: Tensor,
        feature_dims: int | None,
        fill: float | None = None,
    ) -> Tensor:
        """``[N, T, *features]``; ``fill``: what shorter ones of packed samples end with."""
        lead = 1 if feature_dims is None else tensor.dim() - feature_dims
        if lead == 0:  # a single vector is a single token
            tensor, lead = tensor.unsqueeze(0), 1
        if self.packing is not None and self.num_samples > 1:
            return self.packing.by_sample(tensor, fill).flatten(1, lead - 1)
        if layout.flattened:
            tensor = tensor.unflatten(layout.axis, (self.num_samples, -1))
            lead += 1
        if layout.axis:
            tensor = tensor.movedim(layout.axis, 0)
        if lead == 2:
            return tensor
        return tensor.flatten(1, lead - 1) if lead > 1 else tensor.unsqueeze(1)

    def by_sample(self, layout: Layout, use: Use, grad_out: Tensor) -> Tensor | None:
        """``[N, *]``, the rest as if each sample were alone; None where samples have own entries.

        Broadcasting has to be what made the sample axis, or else a sample's gradient is not the
        whole parameter's.
        """
        if self.num_samples == 1:
            return grad_out.unsqueeze(0)
        if self.packing is not None:
            if not use.repeats(0, 1):
                return None
            return self.packing.by_sample(grad_out, fill=0.0).unsqueeze(1)
        return self.alone(layout, grad_out) if use.repeats(layout.axis) else None

    def alone(self, layout: Layout, tensor: Tensor) -> Tensor:
        """``[N, *]``, the rest as if each sample were alone. Not of packed samples."""
        if layout.flattened:
            tensor = tensor.unflatten(layout.axis, (self.num_samples, -1))
            return tensor.movedim(layout.axis, 0)
        return tensor.movedim(layout.axis, 0).unsqueeze(1 + layout.axis)


def find_layout(
    one: Shape,
    many: Shape,
    num_samples: int,
    feature_dims: int | None,
    token_counts: Mapping[Place, int],
    unknown: bool = False,
) -> Layout | None:
    """The one axis that is N times as long for N samples as for one; None if there is none.

    ``unknown``: the last one of the other axes may be a feature's as well as the tokens'.
    """
    lead = 1 if feature_dims is None else len(one) - feature_dims
    if len(one) != len(many) or one[lead:] != many[lead:]:
        return None
    grown = [axis for axis in range(len(one)) if one[axis] != many[axis]]
    if len(grown) != 1 or many[grown[0]] != num_samples * one[grown[0]]:
        return None
    share, axis = one[grown[0]], grown[0]
    may_be_tokens = range(lead - unknown if share == 1 else 0)
    token_axes = tuple(a for a in may_be_tokens if a != axis)
    lengths = {one[a] for a in token_axes} or {share}
    places = frozenset(place for place, tokens in token_counts.items() if tokens in lengths)
    return Layout(axis, share > 1, places, len(many), token_axes)


def layout_fits(layout: Layout, shape: Shape, num_samples: int) -> bool:
    """Whether a later batch can have its samples where an earlier one had them."""
    if layout.axis >= len(shape) or layout.dims not in (None, len(shape)):
        return False
    length = shape[layout.axis]
    return length % num_samples == 0 if layout.flattened else length == num_samples


def _share(layout: Layout, shape: Shape, num_samples: int) -> int | None:
    """A sample's part of the flattened axis, if all parts are equal."""
    fits = layout_fits(layout, shape, num_samples)
    return shape[layout.axis] // num_samples if fits else None


def _is_certain(
    layout: Layout | None, shape: Shape, num_samples: int, token_counts: Mapping[Place, int]
) -> bool:
    """Whether the batch's tensors confirm a layout that may be of a list of tokens."""
    if layout is None or not (layout.flattened or layout.bare):
        return True
    if layout.bare:
        return all(token_counts.get(place) == 1 for place in layout.places)
    share = _share(layout, shape, num_samples)
    return share is not None and any(token_counts.get(p) == share for p in layout.places)


def _may_be_list(layout: Layout, shape: Shape, token_counts: Mapping[Place, int]) -> bool:
    """Whether N rows may be such as values have chosen: they are not seen to be all tokens."""
    if layout.flattened or len(shape) != layout.dims:
        return False
    lengths = {shape[axis] for axis in layout.token_axes}
    return not any(token_counts.get(place) in lengths for place in layout.places)


def _confirmed(
    layouts: Sequence[Layout | None], shapes: Sequence[Shape], samples: Sequence[Sequence[Shape]]
) -> list[Layout | None]:
    """The layouts of a site's inputs of which every sample alone brings its part."""
    if any(not len(ones) == len(layouts) == len(shapes) for ones in samples):
        return [None]
    return [
        layout
        if layout is not None
        and all(
            layout.dims == len(ones[call])
            and shape[layout.axis] == len(samples) * ones[call][layout.axis]
            for ones in samples
        )
        else None
        for call, (layout, shape) in enumerate(zip(layouts, shapes, strict=True))
    ]

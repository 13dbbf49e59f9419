"""The one configuration that flags, `additional_config` and `vllm_xargs` all become, with all of its validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from kvsculpt_vllm.sculpt.chain import SEGMENT, segment_for
from kvsculpt_vllm.sculpt.effort import EFFORTS, order
from kvsculpt_vllm.sculpt.options import BUDGETS, METHODS, described

KEY = "kv_compression"

NO_METHOD = {"none": "nothing, plain vLLM"}

ON_FAILURE = {
    "exact": "it keeps its whole cache",
    "select": "it keeps the entries with the highest attention scores, as many for every layer and head, and its whole "
    "cache if that fails, too",
}
"""What a prompt keeps whose compression fails."""

STORE_MODES = {
    "read": "segments are read from it",
    "readwrite": "segments are read from it, and those that are made are written to it",
}
"""What a server does with its store."""

SERVER_ONLY = {
    *("calibration", "decode", "decode_keep_ratio", "max_effort", "max_stall_ms", "pin_blocks", "segment"),
    *("store", "store_mode", "store_size"),
}
"""Settings that no request can change."""


class OneOf:
    """Marks a field that is one of some names."""

    def __init__(self, options: Iterable[str]) -> None:
        self.options = tuple(options)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.options))


Size = Annotated[int, BeforeValidator(lambda given: int(_AS_BYTES.validate_python(given)))]
"""Bytes, given as a number or as a text with a unit."""

_AS_BYTES: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


class WrongSetting(NamedTuple):
    """One wrong setting: the option as its user spells it, what was given, and what is allowed."""

    option: str
    given: Any
    allowed: str

    def __str__(self) -> str:
        return f"{self.option}: got {self.given!r}, allowed: {self.allowed}"


class ConfigError(ValueError):
    """Wrong settings, all of them in one message. `option`, `given` and `allowed` are those of the first."""

    def __init__(self, wrong: list[WrongSetting]) -> None:
        super().__init__("; ".join(map(str, wrong)))
        self.wrong = tuple(wrong)
        self.option, self.given, self.allowed = wrong[0]

    def __reduce__(self) -> tuple:
        # The default would rebuild it from the message; vLLM passes errors between processes.
        return type(self), (list(self.wrong),)


class CompressionConfig(BaseModel):
    """How the KV cache of prompts and answers is compressed. The defaults mean: not at all."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Annotated[str, OneOf(NO_METHOD | METHODS)] = Field(
        default="none",
        description=f"What takes the place of a prompt's KV cache. {described(NO_METHOD | METHODS)}",
    )
    keep_ratio: float = Field(
        default=0.3, gt=0, le=1, description="Fraction of the compressed span's entries that is kept."
    )
    keep_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens whose entries a context keeps, however long it is, in place of a fraction: one that has no "
        "more stays exact. What follows a chain that has them already, in a later turn say, still keeps a little. 0: "
        "the keep ratio says it.",
    )
    budget: Annotated[str, OneOf(BUDGETS)] = Field(default="adaptive", description=described(BUDGETS))
    min_tokens: int = Field(default=512, ge=1, description="Prompts with fewer tokens stay exact.")
    sink: int = Field(default=4, ge=0, description="First tokens of a prompt, kept exactly. Fewer than the block size.")
    window: int = Field(default=64, ge=1, description="Most recent tokens of a prompt, kept exactly.")
    effort: Annotated[str, OneOf(EFFORTS)] = Field(
        default="balanced",
        description="How much time the optimisation takes for its quality: how many queries it fits to, and how many "
        f"steps it optimises keys for. {described({name: effort.meaning for name, effort in EFFORTS.items()})}",
    )
    max_effort: Annotated[str, OneOf(EFFORTS)] = Field(
        default=next(reversed(EFFORTS)), description="The most effort that a request may ask for. The server's only."
    )
    max_error: float = Field(
        default=1.0,
        gt=0,
        description="A segment that has a larger error on held-out queries (relative squared output error plus squared "
        "log-sum-exp error, mean over layers and heads) is made again with as many more entries as it takes, up to all "
        "of them; what the keep ratio says is the least. 1 is an output as far off as none.",
    )
    segment: Annotated[int, Field(ge=64)] | Literal["auto"] = Field(
        default="auto",
        description="A prompt is compressed in segments of so many tokens, while it is computed: each behind those "
        "before it, whose exact cache is given back at once. Longer ones lose less, and take more memory to make. "
        "auto: 4096 for a model whose queries are up to 32768 numbers a position (layers x query heads x head size: "
        "what Llama-3.2-1B has), else 2048, which it also is where the KV cache could not hold --max-model-len "
        "otherwise. The server's only.",
    )
    decode: int = Field(
        default=512,
        ge=0,
        description="What follows a request's segments, an answer above all, becomes a segment, too, once it has grown "
        "by so many tokens, or by a segment's where that is less; the request pauses for it. 0: it stays exact. Fewer "
        "hold less memory and lose more. The server's only.",
    )
    decode_keep_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fraction that is kept of what was written behind a prompt, in place of the keep ratio: an answer "
        "becomes short segments, and what each loses adds up (at 0.6 nothing does). Memory is reckoned "
        "with the larger of the two. 0: the keep ratio. It plays no part where keep tokens are given. The server's "
        "only.",
    )
    on_failure: Annotated[str, OneOf(ON_FAILURE)] = Field(
        default="exact",
        description="If the compression of a prompt fails (it runs out of memory, its numbers are not finite, or it "
        f"meets a bug), this says what the prompt keeps. {described(ON_FAILURE)}",
    )
    max_stall_ms: float = Field(
        default=200,
        ge=0,
        description="For how long, in milliseconds, a compression may hold up the other requests between two steps; "
        "a longer one goes on after the next step. While nobody else runs or waits it goes on for a second at a time. "
        "The server's only.",
    )

    calibration: str = Field(
        default="auto",
        description="What adaptive budgets of the method sculpt follow: a file that `kvsculpt calibrate` wrote, or "
        "none, a pilot on each prompt, which takes longer. auto: kvsculpt-calibration.json in the model's directory, "
        "what a server has measured, or what comes with the plugin for the model, else none. measure: the same, and "
        "where there is none the first start measures it, which takes minutes. The server's only.",
    )

    store: str = Field(
        default="none",
        description="Where segments are kept beyond a server's life, and shared with other servers: a directory, or a "
        "URL that fsspec knows (s3://…). It needs prefix caching. The server's only.",
    )
    store_mode: Annotated[str, OneOf(STORE_MODES)] = Field(
        default="readwrite", description=f"What happens to the store. {described(STORE_MODES)} The server's only."
    )
    store_size: Size = Field(
        default=100 * 2**30,
        ge=0,
        description="Bytes that the store may take, with or without a unit (500GB, 64GiB): what was used longest ago "
        "goes first. 0: as many as there are. The server's only.",
    )
    pin_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="KV cache blocks that pinned prefixes may take together. auto: a quarter. The server's only.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):  # pydantic would take True for 1
            raise ValueError("a boolean is no setting")
        return value

    @property
    def segment_tokens(self) -> int:
        """Tokens of a segment. A configuration that does not know its model yet has none where `segment` is auto."""
        assert self.segment != "auto", "for_model says how long segments are"
        return self.segment

    @property
    def active(self) -> bool:
        """Whether anything is compressed."""
        return self.method != "none"

    def kept(self, num_tokens: int) -> float:
        """The fraction of the entries of a context of `num_tokens` that is kept, at most 1."""
        return min(1.0, self.keep_tokens / num_tokens) if self.keep_tokens else self.keep_ratio

    @property
    def kept_of_answers(self) -> float | None:
        """The fraction that is kept of what is written; None where it is kept as prompts are."""
        return None if self.keep_tokens else self.decode_keep_ratio or None

    @property
    def at_most(self) -> CompressionConfig:
        """The same with the larger of the two fractions for all: what a context takes if nobody knows how much of it is
        written.
        """
        if not self.decode_keep_ratio:
            return self
        most = max(self.keep_ratio, self.decode_keep_ratio)
        return self.model_copy(update={"keep_ratio": most, "decode_keep_ratio": 0.0})

    @property
    def amount(self) -> str:
        """How much is kept, in words."""
        return f"{self.keep_tokens} tokens" if self.keep_tokens else f"a fraction of {self.keep_ratio:g}"

    @property
    def efforts(self) -> tuple[str, ...]:
        """The efforts that are allowed, from the least to `max_effort`."""
        return tuple(EFFORTS)[: order(self.max_effort) + 1]

    def accepts(self, effort: str, error: float) -> bool:
        """Whether a segment that took this effort and has this held-out error is as good as a request asks for."""
        return error <= self.max_error and order(effort) >= order(self.effort)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> CompressionConfig:
        """Read the entry `kv_compression` of vLLM's `additional_config`: a method's name, or a dict of the fields.

        An `additional_config` that is not a dict (vLLM allows any hashable object) carries no settings of ours.

        Raises:
            ConfigError: on unknown settings, wrong values, or settings without a method.
        """
        entry = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if entry is None:
            return cls()
        settings = as_settings(entry)
        wrong = [
            WrongSetting(f"{KEY}.{key}", value, f"no such setting, there are {', '.join(cls.model_fields)}")
            for key, value in settings.items()
            if key not in cls.model_fields
        ]
        config = _build({k: v for k, v in settings.items() if k in cls.model_fields}, flag, wrong)
        if not config.active and (unused := settings.keys() - {"method"}):
            cure = "nothing while compression is off, add --kv-compression sculpt"
            raise ConfigError([WrongSetting(flag(key), settings[key], cure) for key in sorted(unused)])
        return config._consistent(flag)

    def for_request(self, extra_args: Mapping[str, Any] | None) -> CompressionConfig:
        """This configuration with a request's own settings, `kv_compression` and `kv_compression_<field>`.

        A request may give settings beside `kv_compression: "none"`, so that a client that compares switches one key.

        Raises:
            ConfigError: on unknown settings, wrong values, or any setting where the server does not compress.
        """
        given = request_settings(extra_args)
        if not given:
            return self
        if not self.active:
            cure = "nothing, this server does not compress: start it with --kv-compression sculpt"
            raise ConfigError([WrongSetting(key, value, cure) for key, value in given.items()])
        fields = {request_key(field): field for field in type(self).model_fields if field not in SERVER_ONLY}
        wrong = [WrongSetting(key, value, _cure(key)) for key, value in given.items() if key not in fields]
        changes = {fields[key]: value for key, value in given.items() if key in fields}
        if "keep_ratio" in changes:  # a request that names a fraction does not mean the server's number of tokens
            changes = {"keep_tokens": 0} | changes
        return _build(self.model_dump() | changes, request_key, wrong)._consistent(request_key)

    def _consistent(self, spell: Callable[[str], str]) -> CompressionConfig:
        """This configuration, with defaults that follow from other settings.

        Raises:
            ConfigError: if settings that are allowed each for itself do not go together.
        """
        longest = math.inf if self.segment == "auto" else self.segment
        if self.decode > longest and "decode" not in self.model_fields_set:
            return self.model_copy(update={"decode": self.segment})._consistent(spell)
        if self.decode > longest:
            cure = f"a whole number up to {flag('segment')}, which is {self.segment}"
            raise ConfigError([WrongSetting(spell("decode"), self.decode, cure)])
        if self.decode_keep_ratio and not self.decode:
            cure = f"nothing while {flag('decode')} is 0, which keeps all that is written"
            raise ConfigError([WrongSetting(spell("decode_keep_ratio"), self.decode_keep_ratio, cure)])
        if self.effort not in self.efforts:
            cure = f"{', '.join(self.efforts)} ({flag('max_effort')} is {self.max_effort})"
            raise ConfigError([WrongSetting(spell("effort"), self.effort, cure)])
        return self

    def for_model(self, query_numbers: int) -> CompressionConfig:
        """This configuration with the length of segments that auto means for a model whose queries at one position are
        so many numbers (layers x query heads x head size).

        Raises:
            ConfigError: what was given for `decode` is more than that.
        """
        if self.segment != "auto":
            return self
        return self.model_copy(update={"segment": segment_for(query_numbers)})._consistent(flag)

    def in_short_segments(self) -> CompressionConfig | None:
        """This configuration with the shortest segments that it may mean; None where `decode` is more than they are."""
        if self.segment != "auto":
            return self
        return None if self.decode > SEGMENT else self.model_copy(update={"segment": SEGMENT})

    def check_block_size(self, block_size: int, spell: Callable[[str], str]) -> None:
        """Check what depends on the KV cache's block size; `spell` is `flag` or `request_key`.

        Raises:
            ConfigError: if the sink does not fit into the first block next to at least one compressed entry.
        """
        if self.active and self.sink >= block_size:
            raise ConfigError(
                [WrongSetting(spell("sink"), self.sink, f"a whole number below the block size {block_size}")]
            )


def flag(field: str) -> str:
    """A field's command-line flag, such as `--kv-compression-keep-ratio`."""
    return "--" + request_key(field).replace("_", "-")


def request_key(field: str) -> str:
    """A field's key in a request's `vllm_xargs`, such as `kv_compression_keep_ratio`."""
    return KEY if field == "method" else f"{KEY}_{field}"


def request_settings(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of a request's extra arguments that are meant for us, misspelt ones included."""
    if not extra_args:
        return {}
    return {key: value for key, value in extra_args.items() if key.lower().replace("-", "_").startswith(KEY)}


def _cure(key: str) -> str:
    """What to do about a key that no request can give."""
    if key in map(request_key, SERVER_ONLY):
        return "nothing in a request, it is a setting of the server"
    return f"no such setting, did you mean {_nearest_key(key)}?"


def _nearest_key(key: str) -> str:
    keys = {request_key(field): request_key(field) for field in CompressionConfig.model_fields.keys() - SERVER_ONLY}
    keys[f"{KEY}_method"] = KEY  # the field's name, which a request spells without it
    return keys[get_close_matches(key, keys, 1, cutoff=0)[0]]


def as_settings(entry: Any) -> dict[str, Any]:
    """The entry `kv_compression` as a dict of fields; what is not a dict names the method."""
    return dict(entry) if isinstance(entry, Mapping) else {"method": entry}


def parse_field(field: str, value: Any) -> Any:
    """Validate one field on its own.

    Raises:
        ConfigError: if the value is not allowed.
    """
    return getattr(_build({field: value}, flag, []), field)


def choices(field: str) -> tuple[str, ...]:
    """The values of a field that has a fixed set of them, else nothing."""
    rules = CompressionConfig.model_fields[field].metadata
    return next((rule.options for rule in rules if isinstance(rule, OneOf)), ())


def allowed(field: str) -> str:
    """What a field may be, in words."""
    if options := choices(field):
        return ", ".join(options)
    info = CompressionConfig.model_fields[field]
    if field == "calibration":
        return "auto, measure, none, or a file that `kvsculpt calibrate` wrote for this model"
    symbols = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{symbol} {getattr(rule, name):g}"
        for rule in info.metadata
        for name, symbol in symbols.items()
        if hasattr(rule, name)
    ]
    if field == "store_size":
        return "a number of bytes, with or without a unit, such as 64GiB"
    if field in ("pin_blocks", "segment"):
        return f"auto, or a whole number >= {64 if field == 'segment' else 0}"
    if field == "store":
        return "none, a directory, or a URL that fsspec knows"
    return f"{'a number' if info.annotation is float else 'a whole number'} {' and '.join(bounds)}"


def _build(values: dict[str, Any], spell: Callable[[str], str], wrong: list[WrongSetting]) -> CompressionConfig:
    """Build a configuration; what was `wrong` before and what is wrong with the values become one error."""
    try:
        config = CompressionConfig(**values)
    except ValidationError as error:
        refused = {str(entry["loc"][0]): entry["input"] for entry in error.errors()}
        also = [WrongSetting(spell(field), value, allowed(field)) for field, value in refused.items()]
        raise ConfigError(wrong + also) from None
    if wrong:
        raise ConfigError(wrong)
    return config

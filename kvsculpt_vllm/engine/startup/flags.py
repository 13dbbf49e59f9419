"""The `--kv-compression` flags. They fill `additional_config`, which vLLM carries to every process."""

import argparse
from functools import partial
from typing import Any

from kvsculpt_vllm.config import KEY, CompressionConfig, ConfigError, as_settings, choices, flag, parse_field
from kvsculpt_vllm.engine.compat.frontend import find_option

GROUP = "KV-Compression"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for every field of the configuration, and let `--additional-config` keep what they set."""
    group = parser.add_argument_group(
        title=GROUP, description="Compression of a prompt's KV cache after its prefill, by the plugin kvsculpt-vllm."
    )
    for field, info in CompressionConfig.model_fields.items():
        options = choices(field)
        group.add_argument(
            flag(field),
            action=_SetField,
            field=field,
            type=partial(_parse, field),
            metavar="{" + ",".join(options) + "}" if options else field.upper(),
            help=f"{info.description} (default: {info.default})",
        )
    _merge_with(find_option(parser, "--additional-config"))


def _parse(field: str, text: str) -> Any:
    try:
        return parse_field(field, text)
    except ConfigError as error:
        # argparse puts the flag in front of this message.
        raise argparse.ArgumentTypeError(f"got {error.given!r}, allowed: {error.allowed}") from None


class _SetField(argparse.Action):
    """Set one field in `namespace.additional_config["kv_compression"]`.

    Not in an attribute of its own: vLLM copies only its own arguments out of the namespace, and its API server
    processes do so before they load the plugin.
    """

    def __init__(self, option_strings: list[str], dest: str, field: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)
        self.field = field

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.additional_config = _both(
            getattr(namespace, "additional_config", None) or {}, {KEY: {self.field: values}}, keep_others=True
        )


def _merge_with(additional_config: argparse.Action) -> None:
    """Let `--additional-config` merge its settings of compression with those of earlier flags; the later one wins."""

    class MergeAction(type(additional_config)):  # type: ignore[misc]  # argparse does not say which class it is
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
        ) -> None:
            earlier = getattr(namespace, "additional_config", None)
            super().__call__(parser, namespace, values, option_string)
            if isinstance(earlier, dict) and isinstance(values, dict):
                namespace.additional_config = _both(earlier, values, keep_others=False)

    additional_config.__class__ = MergeAction


def _both(earlier: dict[str, Any], later: dict[str, Any], keep_others: bool) -> dict[str, Any]:
    """Join two `additional_config`s, the later one winning, and the settings of compression in both.

    The result is a new dict: argparse shares its default among parsers. Other plugins' entries follow vLLM's rule that
    a second `--additional-config` replaces the first, unless `keep_others`.
    """
    result = {**earlier, **later} if keep_others else dict(later)
    settings = [as_settings(config[KEY]) for config in (earlier, later) if config.get(KEY) is not None]
    if settings:
        result[KEY] = {key: value for entry in settings for key, value in entry.items()}
    return result

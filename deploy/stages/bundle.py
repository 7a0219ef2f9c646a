"""The stage ``bundle``: all that a host without a network needs, in one directory with checksums.

Killed at any moment, the same command goes on: a file that is finished is not made again. The
checksums get their name, ``SHA256SUMS``, when everything is there. :mod:`deploy.stages.unbundle` is
the other side.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path

from deploy.console import say
from deploy.copies import bundle_parts
from deploy.copies.bundle import IMAGE, MODEL, PARTS, SOURCE, WEIGHTS, WHEELS, Bundle, opened
from deploy.copies.contents import model_files, packed_files
from deploy.settings.config import Config
from deploy.stages.stage import Stage
from kt_kernel.errors import UserError

DEFAULT_IMAGE = "deepseek-v32:local"


def run(config: Config, directory: Path, chosen: list[str] | None, image: str) -> int:
    """Fill the directory.

    Args:
        chosen: names of :data:`PARTS`; None takes all, but for an image that no engine has.

    Returns:
        0, if everything is there.

    Raises:
        UserError: what stopped it, in one line.
    """
    environment = config.environment
    engine = bundle_parts.engine_with(image, environment)
    if engine is None and chosen is None:
        say(f"no container engine here has the image {image}: left out (`make image` builds it)")
        chosen = [part for part in PARTS if part != IMAGE]
    # What is wrong is told now: not after the copies, and not when a whole bundle counts as begun.
    if chosen is None or SOURCE in chosen:
        bundle_parts.commit_of(environment)
    for part in PARTS:
        if chosen is None or part in chosen:
            _check(part, config, engine, image)
    with opened(directory) as bundle:
        for part in PARTS:
            if chosen is None or part in chosen:
                _add(bundle, part, config, engine, image)
        bundle.finish()
    return 0


def _check(part: str, config: Config, engine: str | None, image: str) -> None:
    """Raise UserError if a part cannot be had."""
    if part == MODEL:
        model_files(config.path("KT_MODEL_PATH"))
    elif part == WEIGHTS:
        packed_files(config.path("KT_WEIGHT_PATH"))
    elif part == IMAGE and engine is None:
        raise UserError(
            f"no container engine here has the image {image}: build it with `make image`, name "
            f"another with IMAGE, or leave out the part `image`"
        )


def _add(bundle: Bundle, part: str, config: Config, engine: str | None, image: str) -> None:
    environment: Mapping[str, str] = config.environment
    if part == MODEL:
        path = config.path("KT_MODEL_PATH")
        bundle.copy(part, path, model_files(path))
    elif part == WEIGHTS:
        path = config.path("KT_WEIGHT_PATH")
        bundle.copy(part, path, packed_files(path))
    elif part == IMAGE:
        assert engine is not None
        name = bundle_parts.image_name(engine, image, environment)
        bundle.make(
            part,
            name,
            lambda path, progress: bundle_parts.save_image(
                engine, image, path, environment, progress
            ),
        )
    elif part == WHEELS:
        bundle.fill(part, lambda folder: bundle_parts.fetch_wheels(folder, environment))
    elif part == SOURCE:
        name = f"{bundle_parts.PREFIX}-{bundle_parts.commit_of(environment)[:12]}.bundle"
        bundle.make(
            part,
            name,
            lambda path, progress: bundle_parts.save_source(path, environment, progress),
        )


def add_bundle(parser: ArgumentParser) -> None:
    """The arguments of both sides."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory of the bundle")
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="take this part only; may be repeated. The default is all that there are",
    )


def _add_arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "--image",
        default=DEFAULT_IMAGE,
        help="name of the container image (default: %(default)s)",
    )


STAGE = Stage(
    "bundle",
    "collect model, weights, image, wheels and source for a host without a network",
    lambda config, args, _: run(config, args.directory, args.part, args.image),
    _add_arguments,
)

"""All stages, in the order of ``--help``. A new one is a module with a ``STAGE``, and a row here.

The modules load at their top only what is fast to load: each stage's ``--help`` takes all of them.
"""

from __future__ import annotations

from deploy.stages import (
    bundle,
    check,
    convert,
    download,
    health,
    serve,
    smoke,
    status,
    unbundle,
)

STAGES = {
    stage.name: stage
    for stage in (
        check.STAGE,
        download.STAGE,
        convert.STAGE,
        serve.STAGE,
        smoke.STAGE,
        health.STAGE,
        status.STAGE,
        bundle.STAGE,
        unbundle.STAGE,
    )
}

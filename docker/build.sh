#!/bin/sh
# build.sh [--missing] SERVICE...: build the images of these services, labelled with the revision,
# and say beforehand what a first build takes. --missing: those that are not there, unless they come
# from a registry (PULL_POLICY). COMPOSE is the command, as in `docker compose -f docker-compose.yml`.
set -eu
only_missing=
if [ "$1" = --missing ]; then only_missing=yes; shift; fi
wanted=
first=
for service; do
  image=$($COMPOSE config --images "$service")
  if docker image inspect "$image" >/dev/null 2>&1; then
    if [ -n "$only_missing" ]; then continue; fi
  else
    if [ -n "$only_missing" ] && ! $COMPOSE config "$service" | grep -q '^ *pull_policy: never$'; then
      continue
    fi
    # The router's is small, and built in a minute.
    if [ "$service" != router ]; then first=${first:-$image}; fi
  fi
  wanted="$wanted $service"
done
[ -n "$wanted" ] || exit 0
if [ -n "$first" ]; then
  cat >&2 <<END
There is no image $first yet. To build it takes some 10 minutes, 5 GB of downloads and 25 GB of
disk, of which the image keeps 10. After a change of this project it takes seconds.
END
fi
# A folder that is no checkout has no revision.
REVISION=$(git describe --always --dirty --exclude='*' 2>/dev/null) || REVISION=
IMAGE_VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
export REVISION IMAGE_VERSION
# One after the other, since they share layers.
for service in $wanted; do $COMPOSE build "$service"; done

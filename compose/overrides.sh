#!/bin/sh
# overrides.sh: the names of compose/NAME.yml that this project was last started with, for the targets
# of the Makefile that are not told (WITH). What compose itself cannot do is empty here: whoever calls
# it next says why.
set -eu
containers=$(docker compose -f docker-compose.yml ps -aq 2>/dev/null) || exit 0
[ -n "$containers" ] || exit 0
label='{{.Created}} {{index .Config.Labels "com.docker.compose.project.config_files"}}'
# shellcheck disable=SC2086  # a list of containers
files=$(docker inspect --format "$label" $containers 2>/dev/null) || exit 0
# Compose keeps a container that another `up` would start just so, with the label of the first one.
files=$(echo "$files" | sort | tail -n 1 | cut -d ' ' -f 2-)
names=
for name in $(echo "$files" | tr , '\n' | sed -n 's|.*/compose/\([^/]*\)\.yml$|\1|p'); do
  case " $names " in *" $name "*) continue ;; esac
  if [ -f "compose/$name.yml" ]; then names="${names:+$names }$name"; fi
done
[ -z "$names" ] || echo "WITH=\"$names\", as what is there was started (WITH= is without)" >&2
echo "$names"

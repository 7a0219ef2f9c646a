#!/bin/sh
# pip.sh pip|uv ARGUMENT...: run an installer of the stage `tools` with the index and certificates of
# the build secrets pip_conf and ca_bundle, where they are given. Nothing of them stays.
set -eu
conf=/run/secrets/pip_conf
bundle=/run/secrets/ca_bundle
tool=$1
shift
if [ -s "$bundle" ]; then
  export PIP_CERT="$bundle" SSL_CERT_FILE="$bundle" REQUESTS_CA_BUNDLE="$bundle"
fi
if [ -s "$conf" ]; then export PIP_CONFIG_FILE="$conf"; fi
# Where it is mounted, or where it is made.
build=/run/build
[ -d "$build" ] || build=/opt/build
python=$build/bin/python
if [ "$tool" = uv ]; then
  # uv does not read pip's configuration.
  option() { "$python" -m pip config get "global.$1" 2>/dev/null || true; }
  index=$(option index-url)
  more=$(option extra-index-url | tr '\n' ' ')
  if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
  if [ -n "$more" ]; then export UV_INDEX="$more"; fi
  exec "$build/bin/uv" "$@"
fi
exec "$python" -m pip --no-cache-dir --disable-pip-version-check "$@"

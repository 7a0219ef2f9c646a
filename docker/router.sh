#!/bin/sh
# router.sh FLAG...: SGLang's router before the servers in WORKER_URLS, or before the REPLICAS
# servers of the compose project PROJECT, which listen on PORT (compose/replicas.yml).
set -eu
fail() { echo "error: $1" >&2; exit 2; }
if [ -z "${WORKER_URLS:-}" ]; then
  # By the containers' names: an address may change when a container starts again.
  for number in $(seq "$REPLICAS"); do
    WORKER_URLS="${WORKER_URLS:-} http://$PROJECT-serve-$number:$PORT"
  done
fi
for url in $WORKER_URLS; do
  case $url in
    http://?* | https://?*) ;;
    *) fail "WORKER_URLS: expected addresses like http://host:30000, found $url" ;;
  esac
done
if [ -n "${KT_API_KEY_FILE:-}" ]; then
  [ -z "${KT_API_KEY:-}" ] || fail "both KT_API_KEY and KT_API_KEY_FILE are set: keep one of them"
  [ -r "$KT_API_KEY_FILE" ] || fail "cannot read KT_API_KEY_FILE $KT_API_KEY_FILE"
  KT_API_KEY=$(cat "$KT_API_KEY_FILE")
fi
# The servers are not behind a proxy for the internet.
unset HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy
# The servers' key: it opens what the router asks them, and clients have to send it, too.
[ -z "${KT_API_KEY:-}" ] || set -- --api-key "$KT_API_KEY" "$@"
# A server that has not answered by the end of the start-up time would never be asked again, and
# one that downloads and converts first takes hours.
# A request goes to one server. The router would send what ended one to the next, up to five times.
# shellcheck disable=SC2086  # a list of addresses
exec python -m sglang_router.launch_router --host 0.0.0.0 --worker-urls $WORKER_URLS \
  --worker-startup-timeout-secs 31536000 --disable-retries "$@"

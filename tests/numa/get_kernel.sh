#!/usr/bin/env bash
# Unpacks the distribution's kernel for small virtual machines into .cache/guest, where
# test_two_nodes.py looks for it. Nothing is installed.
set -euo pipefail
folder=$(realpath "$(dirname "$0")/../..")/.cache/guest
if compgen -G "$folder/boot/vmlinuz-*" > /dev/null; then exit 0; fi

# The package that this one stands for: Debian's name, then Ubuntu's.
package=
for meta in linux-image-cloud-amd64 linux-image-virtual; do
  found=$(apt-cache depends "$meta" 2>/dev/null) || continue
  package=$(sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' <<< "$found" | sed -n 1p)
  [[ -z $package ]] || break
done
if [[ -z $package ]]; then
  echo "error: apt knows no kernel package: run apt-get update, or set KT_GUEST_KERNEL" >&2
  exit 2
fi
mkdir -p "$(dirname "$folder")"
partial=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$partial"' EXIT
(cd "$partial" && apt-get download -q "$package")
dpkg -x "$partial"/*.deb "$partial/files"
rm -rf "$folder"
mv "$partial/files" "$folder"

#!/bin/sh
# apt-install.sh PACKAGE...: install, and leave no lists, caches or traces of a mirror behind.
# APT_MIRROR, as in http://mirror.example, replaces scheme and host of the distribution's sources
# for this run only; the paths (/debian, /ubuntu) stay.
set -eu
export DEBIAN_FRONTEND=noninteractive
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
mkdir "$sources/parts"
cp -a /etc/apt/sources.list.d/. "$sources/parts/" 2>/dev/null || true
if [ -f /etc/apt/sources.list ]; then cp /etc/apt/sources.list "$sources/parts/distribution.list"; fi
if [ -n "${APT_MIRROR:-}" ]; then
  find "$sources/parts" -type f -exec \
    sed -i -E "s#https?://[^/ ]+/(debian|ubuntu)#${APT_MIRROR%/}/\1#g" {} +
fi
chmod -R a+rX "$sources"
set -- -o "Dir::Etc::SourceList=/dev/null" -o "Dir::Etc::SourceParts=$sources/parts" -- "$@"
# apt-get update takes no package names: give it the options alone.
apt-get -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$sources/parts" -qq update
apt-get -qq install -y --no-install-recommends "$@" >/dev/null
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old \
  /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /usr/share/man/*
# Of the documentation the licences stay, with the links of packages that share a folder.
find /usr/share/doc -mindepth 2 ! -type d ! -name copyright -delete
find /usr/share/doc -mindepth 1 -type d -empty -delete

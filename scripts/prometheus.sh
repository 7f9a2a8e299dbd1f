#!/usr/bin/env bash
# Prints the folder that holds `prometheus` and `promtool`: the installed ones, or Debian's, unpacked into out/tools.
# Nothing is installed and no service starts; needs apt-get and dpkg once.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v prometheus > /dev/null && command -v promtool > /dev/null; then dirname "$(command -v promtool)"; exit; fi
tools=$PWD/out/tools
if [ ! -x "$tools/usr/bin/promtool" ]; then
  mkdir -p "$tools/deb"
  cd "$tools/deb"
  apt-get -qq download prometheus >&2 || { apt-get -qq update >&2; apt-get -qq download prometheus >&2; }
  dpkg -x prometheus_*.deb "$tools"
fi
echo "$tools/usr/bin"

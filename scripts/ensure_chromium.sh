#!/usr/bin/env bash
# Chromium and its driver, for the tests that look at TensorBoard and at HTML reports. Installs Debian's where that can
# be done without asking (root, apt-get); elsewhere says so, and those tests are skipped with a reason.
set -euo pipefail

present() {
  { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 &&
    command -v chromedriver >/dev/null 2>&1
}

present && exit 0
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null 2>&1; then
  echo "Chromium and chromedriver are not installed: the browser tests will be skipped."
  exit 0
fi
echo "Installing Chromium and its driver (Debian's chromium, chromium-driver) for the browser tests ..."
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
for attempt in 1 2 3; do
  # DPkg::Lock::Timeout: another apt-get may be at work.
  if { apt-get -o DPkg::Lock::Timeout=300 update &&
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends chromium chromium-driver; } >"$log" 2>&1; then
    break
  fi
  echo "  attempt $attempt failed"
  sleep 5
done
if ! present; then
  tail -n 20 "$log"
  echo "Chromium could not be installed: the browser tests will be skipped."
fi
rm -f "$log"

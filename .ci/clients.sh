#!/usr/bin/env bash
# Clients and engines that others wrote, against foveate serve, in an environment of their own over the given one.
# Usage: .ci/clients.sh [python with requirements/dev.txt and foveate] [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")  # not resolved further: a link is what makes it the environment's python
shift || true
venv=build/clients
stamp=$venv/.installed-$(cat requirements/clients.txt requirements/openai-0.txt | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  rm -rf $venv
  "$python" -m venv $venv
  # What it lacks it finds in the given environment, torch above all, whose .pth files count too.
  site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' > "$site/given.pth"
  pip="$venv/bin/python -m pip install --quiet --no-deps --disable-pip-version-check"
  $pip -r requirements/clients.txt
  $pip --target $venv/openai-0 -r requirements/openai-0.txt
  touch "$stamp"
fi
timeout 300 npm ci --silent --prefix tests/serve/node_client
# Nothing of this may be skipped here for want of a package.
# A file stays in one process, which starts its server once. The clients leave their connections to the garbage collector.
FOVEATE_CLIENTS=$PWD/$venv $venv/bin/python -m pytest -q -n 2 --dist loadfile -m clients \
  -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning "$@" $(grep -rl --include='test_*.py' 'pytest\.mark\.clients' tests)

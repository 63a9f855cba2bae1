#!/usr/bin/env bash
# foveate's plug-in inside vLLM, in an environment of its own over the given one. Not part of .ci/run: vLLM is a download of 130 MB.
# Usage: .ci/vllm.sh [python with requirements/dev.txt and foveate] [--install, or arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")  # not resolved further: a link is what makes it the environment's python
shift || true
venv=build/vllm
stamp=$venv/.installed-$(sha256sum requirements/vllm.txt | cut -c1-16)
if [ ! -e "$stamp" ]; then
  rm -rf $venv
  "$python" -m venv $venv
  site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' > "$site/given.pth"
  timeout 900 $venv/bin/python -m pip install --quiet --no-deps --disable-pip-version-check -r requirements/vllm.txt
  touch "$stamp"
fi
if [ "${1:-}" = --install ]; then exit; fi
FOVEATE_VLLM=1 timeout 1800 $venv/bin/python -m pytest -q -m vllm "$@" tests/integrations/test_vllm_plugin.py

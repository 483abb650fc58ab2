#!/usr/bin/env bash
# Runs one step of the benchmark, or `all` of them in order. README.md lists them.
#
#   bash run.sh STEP [FLAGS...]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=settings.sh
source "$here/settings.sh"
# shellcheck source=../common/steps.sh
source "$here/../common/steps.sh"
main "$@"

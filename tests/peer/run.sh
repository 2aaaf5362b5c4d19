#!/usr/bin/env bash
# Runs the peer that follows docs/protocol.md with the library. It needs Python's package cryptography: the system's, else one from PyPI.
#   run.sh LIBRARY [WORD...]      LIBRARY: libuccl_p2p.so; WORD: only the cases whose names contain one of the words
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,3p' "$0"; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'from cryptography.hazmat.primitives.asymmetric import x25519' 2>/dev/null; then
    venv=$repo/.venv/peer
    if [ ! -e "$venv/complete" ]; then
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check cryptography || { echo "SKIPPED: cryptography could not be downloaded"; exit 77; }
        touch "$venv/complete"
    fi
    python=$venv/bin/python
fi
# The peer provokes refusals, which the library logs.
UCCL_P2P_LOG_LEVEL=${UCCL_P2P_LOG_LEVEL:-off} PYTHONDONTWRITEBYTECODE=1 exec "$python" "$here/test_peer.py" "$@"

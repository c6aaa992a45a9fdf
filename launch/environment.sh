# Sourced by the scripts in this folder: makes .venv in the checkout and installs kmem with the given extras into it.
# A repeated call takes a second: a stamp file records what was installed.
#
#   install_kmem EXTRAS        e.g. install_kmem dev

cd "$(dirname "${BASH_SOURCE[0]}")/.."

install_kmem() {
    local extras=$1 python=${PYTHON:-python3} stamp wanted
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "kmem needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Name another: PYTHON=python3.12 bash $0" >&2
            exit 2
        }
        echo "making .venv"
        "$python" -m venv .venv
    fi
    stamp=.venv/kmem-installed-$extras
    wanted=$(cat setup.py launch/constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing kmem[$extras] into .venv (a few minutes the first time)"
        # Keep an installed torch that satisfies kmem's range: constrain it to its own version.
        local constraints=.venv/constraints.txt torch
        cp launch/constraints.txt "$constraints"
        torch=$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null || true)
        if [ -n "$torch" ]; then
            sed -i "s/^torch==.*/torch==$torch/" "$constraints"
        fi
        # deepspeed is published as source; its operators are compiled when used, not when installed. Its build imports
        # torch, so torch is installed first, and build isolation, which would fetch another torch, is off.
        .venv/bin/python -m pip install -q --disable-pip-version-check -c "$constraints" torch setuptools wheel
        DS_BUILD_OPS=0 .venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation \
            -c "$constraints" -e ".[$extras]"
        echo "$wanted" > "$stamp"
    fi
    export DS_ACCELERATOR=${DS_ACCELERATOR:-$(.venv/bin/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
    PATH=$PWD/.venv/bin:$PATH
}

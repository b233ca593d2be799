# Sourced by the other scripts: a checked Python and a virtual environment made from it.

# Sets PYTHON to the interpreter to use; ends the script if there is none that fits.
find_python() {
    PYTHON="${PYTHON:-python3}"
    if ! command -v "$PYTHON" >/dev/null; then
        echo "error: $PYTHON was not found; install Python 3.11, 3.12 or 3.13, or name one: PYTHON=/path/to/python $0" >&2
        exit 2
    fi
    if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
        echo "error: $PYTHON is $("$PYTHON" --version 2>&1); this needs Python 3.11, 3.12 or 3.13." \
            "Name one: PYTHON=python3.12 $0" >&2
        exit 2
    fi
}

# make_environment FOLDER: a virtual environment of PYTHON in FOLDER, made anew if the one there is broken or of
# another Python version.
make_environment() {
    local folder="$1" version='import sys; print(sys.version_info[:3])'
    if [[ "$("$folder/bin/python" -c "$version" 2>/dev/null)" == "$("$PYTHON" -c "$version")" ]] &&
        "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [[ -e "$folder" && ! -e "$folder/pyvenv.cfg" ]]; then
        echo "error: $folder exists and is no virtual environment; move it away" >&2
        exit 6
    fi
    echo "Making the virtual environment $folder ($("$PYTHON" --version))"
    if ! "$PYTHON" -m venv --clear "$folder"; then
        echo "error: $PYTHON cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 8
    fi
}

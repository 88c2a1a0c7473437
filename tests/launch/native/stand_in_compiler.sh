#!/bin/sh
# Stands in for g++ and nvcc: writes its arguments down, and makes what a compiler makes, empty. A source that names
# rows/gather_rows_c..., or is that or its kernel, is said to include $INCLUDED. A program that it links prints the
# instruction sets of a machine.
echo "$(basename "$0") $*" >>"$LOG"
while [ $# -gt 0 ]; do
    case "$1" in
        -o) target="$2" ;;
        -c) source="$2" ;;
        -MF) rule="$2" ;;
    esac
    shift
done
case "$source $(cat "$source" 2>/dev/null)" in
    *rows/gather_rows_c* | *rows/gather_rows.cu*) included="$INCLUDED" ;;
esac
if [ -n "$rule" ]; then printf '%s: %s \\\n  %s\n' "$target" "$source" "$included" >"$rule"; fi
printf '#!/bin/sh\necho avx2\necho portable\n' >"$target"
chmod +x "$target"

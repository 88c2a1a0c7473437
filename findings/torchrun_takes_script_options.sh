#!/usr/bin/env bash
# torch 2.13.0: options of a script under torchrun.
#
# Guess: what follows the script's name is the script's.
# Seen:  an option of the script that begins two or more of torchrun's own (--log, --max, --master, ...) is refused as
#        ambiguous, and the script never starts. One that equals an option of torchrun passes.
# Here:  no option of `moetrain train` may begin one of torchrun's; tests/docs/test_forge.py holds it to that.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
echo 'import sys; print("script got", *sys.argv[1:])' >"$folder/script.py"
right=1
for option in --log --max --master --log-dir --name; do
    "$python" -m torch.distributed.run --standalone --nproc-per-node 1 \
        "$folder/script.py" "$option" 3 >"$folder/said" 2>&1 || true
    said="$(grep -E "script got|ambiguous option" "$folder/said" | tail -n 1)"
    echo "script.py $option 3: ${said:0:100}"
    case "$option" in
        --log | --max | --master) [[ "$said" == *"ambiguous option: $option could match"* ]] || right=0 ;;
        *) [[ "$said" == "script got $option 3" ]] || right=0 ;;
    esac
done
echo "guess: the script gets all of them"
verdict test "$right" = 1

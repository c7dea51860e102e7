#!/usr/bin/env bash
# Plans what the variables say, writes the report into the job's summary, and ends as `edgeft plan` does: 3, does not fit.
set -uo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
arguments=("$MODEL" --out "$work/plan.json")
for name in on memory for data target max-seconds; do
  value=${name^^}
  value=${value//-/_}
  [ -z "${!value:-}" ] || arguments+=("--$name" "${!value}")
done
case "${STRICT:-false}" in
  true) arguments+=(--strict) ;;
  false) ;;
  *)
    echo "::error title=strict::expected true or false"
    exit 2
    ;;
esac
while IFS= read -r setting; do
  [ -z "$setting" ] || arguments+=(--set "$setting")
done <<<"${SETTINGS:-}"

EDGEFT_NEXT=0 python -m edgeft plan "${arguments[@]}" >"$work/plan.txt" 2>"$work/said.txt"
code=$?
cat "$work/plan.txt"
cat "$work/said.txt" >&2
report() {
  python -m edgeft report "$work/plan.json" --out "$work/report.md" >/dev/null || exit
  cat "$work/report.md" >>"$GITHUB_STEP_SUMMARY"
}
if [ $code -eq 0 ]; then
  echo "fits=true" >>"$GITHUB_OUTPUT"
  report
  exit 0
fi
what="does not fit"
[ ! -s "$work/plan.json" ] || what="does not fit in every stage"
if [ $code -eq 3 ]; then echo "fits=false" >>"$GITHUB_OUTPUT"; else what="could not be planned"; fi
{
  echo "# This fine-tune $what"
  echo
  sed 's/^/    /' "$work/said.txt"
} >>"$GITHUB_STEP_SUMMARY"
[ ! -s "$work/plan.json" ] || report
# an annotation is one line; what a command line said must not become another command to the runner
echo "::error title=This fine-tune $what::$(sed -n '/^edgeft: /{s/^edgeft: //;p;q}' "$work/said.txt" | sed 's/%/%25/g')"
exit $code

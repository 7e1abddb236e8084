#!/bin/sh
# Make a plain static folder of the page, a bundle and onnxruntime-web: sh samples/web/setup.sh BUNDLE OUT
# Needs node and npm (Debian: apt-get install nodejs npm). What npm brings is kept in a cache, by version.
set -eu
[ $# -eq 2 ] || { echo "usage: sh $0 BUNDLE OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd) bundle=$1 out=$2
[ -f "$bundle/manifest.json" ] || { echo "$bundle: found no manifest.json; give the folder that packlight export wrote" >&2; exit 2; }
command -v npm >/dev/null || { echo "npm is missing; apt-get install nodejs npm" >&2; exit 2; }

version=$(sed -n 's/.*"onnxruntime-web": "\(.*\)".*/\1/p' "$here/package.json")
cache=${PACKLIGHT_DEVICES_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/packlight-devices}/onnxruntime-web-$version
if [ ! -d "$cache" ]; then
    mkdir -p "$(dirname "$cache")"
    fresh=$(mktemp -d "$cache.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    cp "$here/package.json" "$here/package-lock.json" "$fresh"
    (cd "$fresh" && npm ci --ignore-scripts --no-audit --no-fund --silent)
    [ -d "$cache" ] || mv "$fresh" "$cache"   # another setup may have been first
fi

mkdir -p "$out/ort" "$out/bundle"
cp "$here"/index.html "$here"/style.css "$here"/icon.svg "$here"/*.mjs "$out"
dist=$cache/node_modules/onnxruntime-web/dist
cp "$dist/ort.wasm.bundle.min.mjs" "$dist/ort-wasm-simd-threaded.mjs" "$dist/ort-wasm-simd-threaded.wasm" "$out/ort"
for file in "$bundle"/*; do
    [ "${file##*/}" = model.fp32.onnx ] || cp "$file" "$out/bundle"   # the reference may be left off a device
done
echo "$out is ready: python3 -m http.server --directory $out 8000, then open http://localhost:8000"

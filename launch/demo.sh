#!/usr/bin/env bash
# Demonstration from videos to a report: render videos, pack shards, train two methods on 2 processes, report.
# Usage: bash launch/demo.sh [FOLDER]     (default: runs/demo; the second run continues the first)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment "[ui]"

cd "$PROJECT"
folder=${1:-runs/demo}
avcil="$VENV/bin/avcil"
started=$SECONDS

echo "1/4  Rendering labelled videos"
"$avcil" shards synth "$folder/clips"
echo "2/4  Packing WebDataset shards"
"$avcil" shards build "$folder/clips/clips.csv" "$folder/shards"
for method in finetune avcil; do
    [ $method = finetune ] && part=3 || part=4
    echo "$part/4  Training: $method, 4 steps of 2 classes, DeepSpeed on 2 processes"
    "$avcil" train demo --processes 2 method=$method output="$folder" data.manifest="$folder/shards/manifest.json"
done
"$avcil" report "$folder" --page "$folder/report.html" --clips 2
"$avcil" attention "$folder"/demo-{finetune,avcil}-seed0 "$folder"/clips/test/class_000/*.mp4 \
    --heat evidence --class class_000 --regions "$folder/clips/regions.json" --output "$folder/attention.html"

cat <<END

Done in $((SECONDS - started)) s. What next:
  open the pages         $folder/report.html    $folder/attention.html
  show the runs          $VENV/bin/mlflow ui --backend-store-uri sqlite:///$(cd "$folder" && pwd)/mlflow.db
                         http://127.0.0.1:5000/#/experiments?workflowType=machine_learning
  train on your videos   $avcil shards build VIDEOS SHARDS    (VIDEOS/<split>/<class>/*.mp4)
                         $avcil train demo data.manifest=SHARDS/manifest.json scenario.classes_per_step=[2,2]
END

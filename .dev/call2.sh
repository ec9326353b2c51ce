source .dev/env.sh
BIG="--preset=mono_internvl_2b --rows 4 --visual 7168 --text 1024 --steps 5"
say steps
timeout 170 python3 experiments/benchmarks/train_step.py $BIG --stages S1.1 --remat full --forms static dense_both --out=$OUT/step_s1_1_full.json > $OUT/step1.log 2>&1; grep -v -i warn $OUT/step1.log | tail -9
say S2
timeout 130 python3 experiments/benchmarks/train_step.py $BIG --stages S2 --remat full --forms static --out=$OUT/step_s2_full.json > $OUT/step2.log 2>&1; tail -4 $OUT/step2.log
say attention
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.75
timeout 190 python3 -m experiments.benchmarks.kernels --out=$OUT/k --shapes 2b --ops attention --rows attention/mosaic_gpu attention/cudnn attention/cudnn_masked attention/xla_blocked --budget_s=150 > $OUT/attention.log 2>&1; grep -v "a mask" $OUT/attention.log | tail -45
say experts
L=$(( 575 - $(date +%s) + T0 - 35 )); [ $L -gt 160 ] && L=160
timeout $((L+40)) python3 -m experiments.benchmarks.kernels --out=$OUT/k --shapes 2b --ops ffn --no_tune --budget_s=$L > $OUT/experts.log 2>&1; tail -45 $OUT/experts.log
rm -f $OUT/k/*.png $OUT/k/kernels.md; mv $OUT/k/* $OUT/; rmdir $OUT/k
ls $OUT; say end

source .dev/env.sh
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee $OUT/gpu.txt
python3 -c "
import jax,flax,optax,orbax.checkpoint as o,numpy,triton,sys
print(sys.version.split()[0],'jax',jax.__version__,'flax',flax.__version__,'optax',optax.__version__,'numpy',numpy.__version__,'triton',triton.__version__, jax.devices())" 2>&1 | tail -3 | tee -a $OUT/gpu.txt
say parity
for c in tests/golden/mono_tiny/*forward*.safetensors tests/golden/mono_tiny/*generate*.safetensors tests/golden/mono_tiny/*train*.safetensors; do echo $c; timeout 100 python3 experiments/parity.py --model_dir=tests/golden/mono_tiny --case=$c --json 2>&1 | tail -2; done > $OUT/parity.log 2>&1
tail -30 $OUT/parity.log | cut -c1-400
say check
timeout 200 python3 -m pallas_kernels.check mosaic_gpu triton attention/mosaic_gpu attention/cudnn attention/cudnn_masked attention/xla_blocked --masks=all --seconds=25 --no_compile --json > $OUT/check.txt 2>$OUT/check.err; grep -v '^{' $OUT/check.txt; tail -3 $OUT/check.err
say kernels
timeout 260 python3 -m experiments.benchmarks.kernels --out=$OUT/kernels --shapes 2b --ops ffn attention --budget_s=200 > $OUT/kernels.log 2>&1; tail -60 $OUT/kernels.log
rm -f $OUT/kernels/*.png
say end

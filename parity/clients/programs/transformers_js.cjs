// Runs on Node with a folder where @huggingface/transformers is installed: transformers_js.cjs FOLDER ARTIFACT DTYPE THREADS
const { createRequire } = require('node:module');
const { readFileSync } = require('node:fs');
const path = require('node:path');
const readline = require('node:readline');

const [folder, artifact, dtype, threads] = process.argv.slice(2);
const { pipeline, env } = createRequire(path.join(folder, 'package.json'))('@huggingface/transformers');

async function main() {
  env.allowRemoteModels = false;
  env.localModelPath = path.dirname(artifact) + path.sep;
  const hear = await pipeline('automatic-speech-recognition', path.basename(artifact), {
    dtype, device: 'cpu', session_options: { intraOpNumThreads: Number(threads), logSeverityLevel: 3 },
  });
  const multilingual = hear.model.generation_config.lang_to_id != null;
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { samples, language } = JSON.parse(line);
    const bytes = readFileSync(samples);
    const audio = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    const { text } = await hear(audio, multilingual ? { language, task: 'transcribe' } : {});
    console.log(JSON.stringify({ text }));
  }
}

main();

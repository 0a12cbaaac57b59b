"use strict";
// The networks of the page in onnxruntime-web. `DATA` and `RUNTIME` are in data.js and runtime.js,
// as scripts, so that the page also works from a file without a server.

const PIXELS = DATA.side * DATA.side;
const CLASSES = DATA.classes;

const Model = (() => {
  let certified = null;
  let gradient = null;

  async function unpack(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function images(pixels) {
    const count = pixels.length / PIXELS;
    return new ort.Tensor("float32", pixels, [count, DATA.side, DATA.side, 1]);
  }

  // onnxruntime runs one request of a session at a time.
  let queue = Promise.resolve();
  function inTurn(run) {
    const result = queue.then(run);
    queue = result.catch(() => {});
    return result;
  }

  return {
    async start() {
      const script = new Blob([await unpack(RUNTIME.mjs)], { type: "text/javascript" });
      ort.env.wasm.numThreads = 1;
      ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(script) };
      ort.env.wasm.wasmBinary = (await unpack(RUNTIME.wasm)).buffer;
      const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
      certified = await ort.InferenceSession.create(await unpack(DATA.certified), options);
      gradient = await ort.InferenceSession.create(await unpack(DATA.gradient), options);
    },

    // Answers of the signature `certified` to pictures, one after another in a Float32Array.
    async serve(pixels) {
      const found = await inTurn(() => certified.run({ image: images(pixels) }));
      return Array.from(found.class.data, (winner, row) => ({
        class: Number(winner),
        margin: found.margin.data[row],
        radius: found.radius.data[row],
      }));
    },

    // Logits, and the gradients of `logits * direction` with respect to the pictures.
    async differentiate(pixels, direction) {
      const count = pixels.length / PIXELS;
      const found = await inTurn(() =>
        gradient.run({
          image: images(pixels),
          direction: new ort.Tensor("float32", direction, [count, CLASSES]),
        }),
      );
      return { logits: found.logits.data, gradient: found.gradient.data };
    },
  };
})();

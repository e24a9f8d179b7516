// The model, beside the page so that the page stays quick: it loads from this Space, and nothing is sent anywhere.
import {
  AutoModelForCausalLM,
  AutoTokenizer,
  InterruptableStoppingCriteria,
  TextStreamer,
  env,
} from "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.1/dist/transformers.min.js";

env.allowLocalModels = true;
env.allowRemoteModels = false;
env.localModelPath = new URL(".", self.location.href).pathname;

const stopping = new InterruptableStoppingCriteria();
const ready = load();

async function load() {
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status === "progress" && file.endsWith(".onnx")) postMessage({ loaded, total });
  };
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  const model = await AutoModelForCausalLM.from_pretrained("model", { dtype: "q8", device: "wasm", progress_callback });
  // A pause before each token, in which a message of the page, such as Stop, is read.
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await pause();
    return forward(inputs);
  };
  return { tokenizer, model };
}

function pause() {
  const { port1, port2 } = new MessageChannel(); // setTimeout would wait 4 ms
  return new Promise((resume) => {
    port1.onmessage = () => {
      port1.close();
      resume();
    };
    port2.postMessage(null);
  });
}

// The prompt as ids: a conversation in the model's template, or the beginning of a document.
function prompt(tokenizer, { messages, answers }) {
  if (answers) return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  const start = tokenizer.bos_token ?? "";
  return tokenizer(start + messages.at(-1).content, { add_special_tokens: false });
}

async function write(request) {
  const { tokenizer, model } = await ready;
  const { max_new_tokens, greedy, context } = request;
  let inputs = prompt(tokenizer, request);
  while (inputs.input_ids.dims[1] + max_new_tokens > context && request.messages.length > 2) {
    request.messages.splice(0, 2); // the oldest turn
    inputs = prompt(tokenizer, request);
  }
  const read = inputs.input_ids.dims[1];
  if (read >= context) throw new Error("too long");
  let tokens = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => postMessage({ text, tokens }),
    token_callback_function: () => (tokens += 1),
  });
  stopping.reset();
  const sampling = { do_sample: true, temperature: 0.8, top_p: 0.95, top_k: 50, repetition_penalty: 1.1 };
  await model.generate({
    ...inputs,
    ...(greedy ? { do_sample: false } : sampling),
    max_new_tokens: Math.min(max_new_tokens, context - read),
    streamer,
    stopping_criteria: stopping,
  });
  postMessage({ done: true, tokens });
}

self.onmessage = async ({ data }) => {
  if (data.stop) return stopping.interrupt();
  try {
    await write(data);
  } catch (error) {
    console.error(error);
    postMessage({ failed: error.message === "too long" ? "long" : "model" });
  }
};

ready.then(
  () => postMessage({ ready: true }),
  (error) => {
    console.error(error);
    postMessage({ failed: "load" });
  },
);

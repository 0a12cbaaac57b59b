/* Serves requests from a SavedModel by the C API of TensorFlow.
 *
 *     serve MODEL REQUESTS ANSWERS N_INPUTS NAME...
 *
 * Names are operations as `name:index`, those of the inputs first. REQUESTS holds for each request
 * its inputs, ANSWERS its outputs after an int32 that is 1, or 0 alone for an error. A tensor is
 * dtype and rank as int32, sizes as int64, data. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tensorflow/c/c_api.h>

enum { MOST = 32 };

static void check(int holds, const char* text) {
  if (holds) return;
  fprintf(stderr, "serve: %s\n", text);
  exit(1);
}

static TF_Output find(TF_Graph* graph, const char* text) {
  char name[1024];
  const char* colon = strrchr(text, ':');
  check(colon != NULL && colon - text < (long)sizeof name, "a name must end in :index");
  memcpy(name, text, colon - text);
  name[colon - text] = 0;
  TF_Output output = {TF_GraphOperationByName(graph, name), atoi(colon + 1)};
  check(output.oper != NULL, text);
  return output;
}

/* The next tensor of a file, or NULL at its end. */
static TF_Tensor* read_tensor(FILE* file) {
  int32_t head[2];
  int64_t sizes[MOST], count = 1;
  if (fread(head, sizeof head, 1, file) != 1) return NULL;
  check(0 <= head[1] && head[1] <= MOST, "rank");
  check(fread(sizes, sizeof *sizes, head[1], file) == (size_t)head[1], "sizes");
  for (int axis = 0; axis < head[1]; ++axis) count *= sizes[axis];
  size_t bytes = count * TF_DataTypeSize(head[0]);
  TF_Tensor* tensor = TF_AllocateTensor(head[0], sizes, head[1], bytes);
  check(bytes == 0 || fread(TF_TensorData(tensor), bytes, 1, file) == 1, "data");
  return tensor;
}

static void write_tensor(FILE* file, const TF_Tensor* tensor) {
  int32_t head[2] = {TF_TensorType(tensor), TF_NumDims(tensor)};
  fwrite(head, sizeof head, 1, file);
  for (int axis = 0; axis < head[1]; ++axis) {
    int64_t size = TF_Dim(tensor, axis);
    fwrite(&size, sizeof size, 1, file);
  }
  fwrite(TF_TensorData(tensor), 1, TF_TensorByteSize(tensor), file);
}

int main(int argc, char** argv) {
  check(argc > 5, "usage: serve MODEL REQUESTS ANSWERS N_INPUTS NAME...");
  const char* tags[] = {"serve"};
  int n_inputs = atoi(argv[4]), n_outputs = argc - 5 - n_inputs;
  check(0 < n_inputs && n_inputs < MOST && 0 < n_outputs && n_outputs < MOST, "names");
  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  TF_Session* session =
      TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(TF_GetCode(status) == TF_OK, TF_Message(status));
  TF_Output names[2 * MOST];
  for (int i = 0; i < n_inputs + n_outputs; ++i) names[i] = find(graph, argv[5 + i]);
  FILE *requests = fopen(argv[2], "rb"), *answers = fopen(argv[3], "wb");
  check(requests != NULL && answers != NULL, "files");
  for (;;) {
    TF_Tensor *inputs[MOST], *outputs[MOST] = {NULL};
    for (int i = 0; i < n_inputs; ++i) inputs[i] = read_tensor(requests);
    if (inputs[0] == NULL) break;
    TF_SessionRun(session, NULL, names, inputs, n_inputs, names + n_inputs, outputs, n_outputs,
                  NULL, 0, NULL, status);
    int32_t served = TF_GetCode(status) == TF_OK;
    if (!served) fprintf(stderr, "serve: %s\n", TF_Message(status));
    fwrite(&served, sizeof served, 1, answers);
    for (int i = 0; i < n_inputs; ++i) TF_DeleteTensor(inputs[i]);
    for (int i = 0; served && i < n_outputs; ++i) {
      write_tensor(answers, outputs[i]);
      TF_DeleteTensor(outputs[i]);
    }
  }
  check(fclose(answers) == 0 && fclose(requests) == 0, "files");
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}

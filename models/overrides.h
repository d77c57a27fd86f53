// models/overrides.h: what ModelOptions does to a configuration, shared by the catalogue and
// importers.
#pragma once

#include "models/models.h"

namespace partita {

/// Throws InputError naming the option when one of them has the wrong sign.
void check_options(const ModelOptions& options);

/// Applies the options; InputError when the model cannot follow them.
void apply_options(TransformerConfig& config, const ModelOptions& options);

/// InputError for options that only transformers follow, `what` being the model's name.
void reject_transformer_options(const std::string& what, const ModelOptions& options);

}  // namespace partita

"""Lists the public names of `fireworks.training.sdk` by module, of 1.2.9 and 1.2.30 together.

A name that stands here and has no counterpart in this package is refused when it is used; one that
stands nowhere is a mistake of the program, and fails at its import. `types` and its submodules are
those of `tinker`, and are not listed.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "": (
        "APIConnectionError APIError APIFuture APIStatusError APITimeoutError AdamParams "
        "AdaptiveConcurrencyController CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE "
        "CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO ConstantSchedule CosineSchedule "
        "CreatedTrainerJob DEFAULT_CHECKSUM_FORMAT DEFAULT_DELTA_COMPRESSION "
        "DEFAULT_MERGED_BASE_EXPORT_PRECISION Datum DeploymentCleanupOnClose DeploymentConfig "
        "DeploymentInfo DeploymentManager DeploymentSampler DeploymentSamplerTimeoutError "
        "EncodedTextChunk ExportPrecision FiretitanProvisioningConfig FiretitanSampleResponse "
        "FiretitanSampledSequence FiretitanSamplingClient FiretitanSamplingParams "
        "FiretitanServiceClient FiretitanTrainingClient FireworksClient "
        "FixedConcurrencyController ForwardBackwardOutput GradAccNormalization "
        "GradNormMetricsMode LRSchedulerSpec LinearSchedule LoraConfig "
        "ModelDetailsUnavailableError ModelInput ModelInputChunk OptimStepResponse "
        "RequestFailedError SampledCompletion SamplingClient SamplingClientClosedError "
        "SamplingConcurrencyController SamplingParams SamplingRequestError SaveSamplerResult "
        "ServerMetrics ServiceClient StopReason TITOCallRecord TITOCallResult TITOChatRequest "
        "TITODistribution TITOError TITOFailureTraceConfig TITOIncrementalPrompt "
        "TITOIncrementalRenderer TITOLocalDebugConfig TITOLocalDebugSink TITOMetricSummary "
        "TITOParseError TITOParsedAssistant TITOPromptMode TITORenderer TITOResponseAttempt "
        "TITOSegmentResult TITOSidecar TITOTrajectoryArtifact TITOTrajectoryEndpoint TITOTurn "
        "TensorData TrainerJobConfig TrainerJobManager TrainerServiceEndpoint "
        "TrainingAPIError TrainingClient TrainingError TrainingShapeProfile "
        "TrajectoryDriftPolicy WSDSchedule WeightSyncResponse WeightSyncer compute_lr "
        "default_constant_schedule dump_tito_failure_trace has_v1_scheduler_fields "
        "install_tinker_service_client normalize_lr_scheduler_spec "
        "normalize_openai_tool_arguments parse_lr_scheduler_spec "
        "patched_tinker_service_client restore_tinker_service_client validate_output_model_id"
    ),
    "client": (
        "APIFuture APIStatusError AwaitableConcurrentFuture "
        "CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO "
        "CROSS_JOB_CHECKPOINT_REF_PREFIX ClientConnectionPoolType Comms CommsV2APIFuture "
        "DEFAULT_FIREWORKS_API_URL DEFAULT_LORA_ALPHA DEFAULT_LORA_INIT_METHOD "
        "DEFAULT_PARALLEL_CHUNK_SEND_CONCURRENCY DeploymentCleanupOnClose DeploymentConfig "
        "DeploymentManager DeploymentSampler ExportPrecision FIRETITAN_TINKER_CLIENT_CONFIG "
        "FiretitanSampleResponse FiretitanSampledSequence FiretitanSamplingClient "
        "FiretitanSamplingParams FiretitanServiceClient FiretitanTrainingClient "
        "FixedConcurrencyController GradAccNormalization GradNormMetricsMode "
        "LoadAdapterResponse PARALLEL_CHUNK_SEND_CONCURRENCY_ENV QueueStateLogger RestClient "
        "RoutingMatrixFormat RoutingReferences SAMPLER_DRAIN_TIMEOUT_S "
        "SAMPLER_SHUTDOWN_TIMEOUT_S SAMPLING_CLIENT_FROM_TRAINER_MESSAGE "
        "SamplerCheckpointMetadata SamplerCheckpointType SamplingClient "
        "SamplingClientClosedError SamplingConcurrencyController SaveSamplerResult "
        "ServiceClient Telemetry TrainingClient WeightSyncResponse clean_context "
        "combine_fwd_bwd_output_results comms_context generate_session_id "
        "make_cross_job_checkpoint_ref normalize_checkpoint_type qualify_snapshot_name "
        "resolve_export_precision resolve_next_checkpoint_type resolve_training_base_url "
        "to_pydantic_input types"
    ),
    "concurrency": (
        "AdaptiveConcurrencyController FixedConcurrencyController SamplingConcurrencyController"
    ),
    "decision": (
        "DEFAULT_DECISION_CONTRACT DecisionCalibration FiniteFloat PositiveTemperature "
        "QuestionType SamplerCheckpointMetadata"
    ),
    "deployment": (
        "AdaptiveConcurrencyController CONSOLE_URL DEFAULT_CHECKSUM_FORMAT "
        "DEFAULT_DELTA_COMPRESSION DEFAULT_DEPLOYMENT_DESCRIPTION DEPLOYMENT_DELETION_POLL_S "
        "DEPLOYMENT_DELETION_TIMEOUT_S DEPLOYMENT_READY_DEFAULT_TIMEOUT_S "
        "DEPLOYMENT_READY_POLL_S DOCS_SDK DeploymentConfig DeploymentInfo DeploymentManager "
        "DeploymentSampler DeploymentSamplerTimeoutError FixedConcurrencyController "
        "HOTLOAD_RECOVERY_STEPS HOTLOAD_WAIT_POLL_S HOTLOAD_WAIT_TIMEOUT_S "
        "HOT_LOAD_TRANSITION_TYPES HOT_LOAD_TRANSITION_TYPE_ASYNC "
        "HOT_LOAD_TRANSITION_TYPE_SYNC HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED_VALUES "
        "HTTP_READ_TIMEOUT_S HTTP_STATUS_HINTS SampledCompletion "
        "SamplingConcurrencyController SamplingRequestError ServerMetrics "
        "WARMUP_PROBE_TIMEOUT_S format_sdk_error normalize_hot_load_transition_type "
        "parse_api_error"
    ),
    "errors": (
        "AGENT_DEBUG_INSTRUCTIONS CONSOLE_URL DISCORD_URL DOCS_SDK HTTP_STATUS_HINTS "
        "MAX_WAIT_TIME RETRYABLE_EXCEPTIONS RETRYABLE_STATUS_CODES TrainingAPIError "
        "async_request_with_retries format_checkpoint_promotion_error format_sdk_error "
        "format_session_checkpoint_promotion_error parse_api_error parse_retry_after "
        "parse_training_api_error request_with_retries"
    ),
    "fireworks_client": (
        "CONSOLE_URL DOCS_SDK FireworksClient HTTP_LONG_WRITE_TIMEOUT_S HTTP_READ_TIMEOUT_S "
        "ModelDetailsUnavailableError RETRYABLE_EXCEPTIONS TrainingShapeProfile "
        "format_checkpoint_promotion_error format_sdk_error "
        "format_session_checkpoint_promotion_error parse_api_error validate_output_model_id"
    ),
    "managed": (
        "CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO "
        "CreatedTrainerJob DEFAULT_DELTA_COMPRESSION DEFAULT_LORA_ALPHA "
        "DEFAULT_TRAINER_PENDING_TIMEOUT_S DEFAULT_TRAINER_TIMEOUT_S "
        "DEPLOYMENT_READY_TIMEOUT_S DEPLOYMENT_SERVING_STATES DEPLOYMENT_TERMINAL_STATES "
        "DeploymentCleanupOnClose DeploymentConfig DeploymentInfo DeploymentManager "
        "DeploymentSampler FiretitanProvisioningConfig FiretitanSamplingClient "
        "FiretitanServiceClient FiretitanTrainingClient HOTLOAD_TIMEOUT_S POLL_INTERVAL_S "
        "REATTACH_SETTLE_TIMEOUT_S SDK_MANAGED_ROLLOUT_DEPLOYMENT_ANNOTATION "
        "SamplingConcurrencyController TrainerJobConfig TrainerJobManager "
        "TrainerServiceEndpoint build_incremental_metadata normalize_hot_load_transition_type"
    ),
    "patches": "",
    "routing": (
        "R3_STORE_HEADER R3_TTL_HEADER RoutingMatrixFormat RoutingReferences concat_routing "
        "copy_routing freeze_routing mask_routing routing_from_wire routing_has_gaps "
        "routing_model_input_kwargs routing_to_wire sampling_mask_model_input_kwargs "
        "top_sampling_model_input_kwargs"
    ),
    "sampling": (
        "AdaptiveConcurrencyController DOCS_SDK DeploymentSampler "
        "DeploymentSamplerTimeoutError ERROR_KIND_CONNECTION ERROR_KIND_HTTP_STATUS "
        "ERROR_KIND_SSE_TRUNCATION ERROR_KIND_TIMEOUT ERROR_KIND_UPSTREAM_STREAM "
        "FixedConcurrencyController R3_STORE_HEADER R3_TTL_HEADER REQUEST_ID_HEADER "
        "RoutingMatrixFormat RoutingReferences SampledCompletion SampledRequestResult "
        "SampledServerAttempt SamplingConcurrencyController SamplingRequestError "
        "ServerMetrics async_request_with_retries clean_context extract_request_id "
        "format_sdk_error parse_retry_after"
    ),
    "sampling_observability": (
        "CONTEXT_KEYS DeploymentSamplerTimeoutError ERROR_KIND_CONNECTION "
        "ERROR_KIND_HTTP_STATUS ERROR_KIND_SSE_TRUNCATION ERROR_KIND_TIMEOUT "
        "ERROR_KIND_UPSTREAM_STREAM REQUEST_ID_HEADER REQUEST_ID_RESPONSE_HEADERS "
        "SamplingRequestError clean_context extract_request_id"
    ),
    "tinker_compat": (
        "FiretitanServiceClient install_tinker_service_client patched_tinker_service_client "
        "restore_tinker_service_client"
    ),
    "tito": (
        "TITOCallRecord TITOCallResult TITOChatRequest TITODistribution TITOError "
        "TITOEventObserver TITOFailureTraceConfig TITOIncrementalPrompt "
        "TITOIncrementalRenderer TITOMetricSummary TITOParseError TITOParsedAssistant "
        "TITOPromptMode TITORenderer TITOResponseAttempt TITOSegmentResult TITOSidecar "
        "TITOTrajectoryArtifact TITOTrajectoryEndpoint TITOTurn TrajectoryDriftPolicy "
        "dump_tito_failure_trace normalize_openai_tool_arguments"
    ),
    "tito_debug": "TITODebugStorageFullError TITOLocalDebugConfig TITOLocalDebugSink",
    "trainer": (
        "CONSOLE_URL CreatedTrainerJob DEFAULT_TRAINER_PENDING_TIMEOUT_S DOCS_SDK "
        "FireworksClient HTTP_READ_TIMEOUT_S HTTP_STATUS_HINTS HTTP_WRITE_TIMEOUT_S "
        "POLL_INTERVAL_S POLL_LOG_HEARTBEAT_S RECONNECT_TIMEOUT_S RESUMABLE_WAIT_TIMEOUT_S "
        "SLOW_POLL_INTERVAL_S TRAINER_READY_TIMEOUT_S TrainerJobConfig TrainerJobManager "
        "TrainerServiceEndpoint format_sdk_error parse_api_error parse_training_api_error"
    ),
    "training_spec": (
        "ConstantSchedule CosineSchedule LRSchedulerSpec LinearSchedule StrictSpec "
        "WSDSchedule compute_lr default_constant_schedule has_v1_scheduler_fields "
        "normalize_lr_scheduler_spec parse_lr_scheduler_spec"
    ),
    "weight_syncer": (
        "DEFAULT_DELTA_COMPRESSION DOCS_SDK DeploymentManager DeploymentSampler "
        "FiretitanSamplingClient FiretitanTrainingClient HOTLOAD_READY_TIMEOUT_S "
        "HOTLOAD_TIMEOUT_S POLL_INTERVAL_S WeightSyncer build_incremental_metadata "
        "format_sdk_error resolve_next_checkpoint_type"
    ),
}

OFFICIAL_NAMES: Mapping[str, frozenset[str]] = {
    module: frozenset(names.split()) for module, names in _NAMES.items()
}
"""The public names of each module; the empty name is the package itself."""

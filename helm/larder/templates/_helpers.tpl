{{- define "larder.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{/* Names of objects: the release's, which may be `larder` itself. */}}
{{- define "larder.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "larder.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "larder.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* (list . "node") */}}
{{- define "larder.selector" -}}
app.kubernetes.io/name: {{ include "larder.name" (first .) }}
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- define "larder.labels" -}}
{{ include "larder.selector" . }}
app.kubernetes.io/version: {{ (first .).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (first .).Release.Service }}
app.kubernetes.io/part-of: larder
helm.sh/chart: {{ printf "%s-%s" (first .).Chart.Name (first .).Chart.Version | replace "+" "_" }}
{{- with (first .).Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "larder.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "larder.nodeServiceAccount" -}}
{{- if .Values.node.serviceAccount.create -}}
{{- .Values.node.serviceAccount.name | default (printf "%s-node" (include "larder.fullname" .)) -}}
{{- else -}}
{{- .Values.node.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{- define "larder.defaultTier" -}}
{{- .Values.defaultTier | default (first .Values.tiers).name -}}
{{- end }}

{{/* The same for every container that needs nothing of its node. */}}
{{- define "larder.unprivileged" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* (list . component replicas) */}}
{{- define "larder.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "larder.selector" . | nindent 8 }}
{{- end }}

{{/* Where keeper, daemon and driver meet, and run. */}}
{{- define "larder.nodePlacement" -}}
{{- with .Values.node.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.node.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.node.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "larder.stateEnv" -}}
- {name: LARDER_STATE, value: {{ .Values.stateDir | quote }}}
- {name: LARDER_SOCKET, value: {{ printf "%s/daemon.sock" .Values.stateDir | quote }}}
{{- end }}

{{/* What a process that reads the lake needs to know of it. */}}
{{- define "larder.configVolumes" -}}
- name: config
  configMap: {name: {{ include "larder.fullname" . }}, defaultMode: 0444}
{{- with .Values.lake.ca.configMap }}
- name: ca
  configMap: {name: {{ . }}, defaultMode: 0444}
{{- end }}
{{- end }}

{{- define "larder.configMounts" -}}
- {name: config, mountPath: /etc/larder, readOnly: true}
{{- if .Values.lake.ca.configMap }}
- {name: ca, mountPath: /etc/larder-ca, readOnly: true}
{{- end }}
{{- end }}

{{- define "larder.credentials" -}}
{{- with .Values.lake.existingSecret }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}

{{/* Text between quotes of TOML. */}}
{{- define "larder.tomlString" -}}
{{- . | toString | toJson -}}
{{- end }}

{{/* The daemon reads and writes tiers of whatever owner, and gives files of them to the kernel (SYS_ADMIN). */}}
{{- define "larder.daemonSecurity" -}}
runAsUser: 0
runAsGroup: 0
runAsNonRoot: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL], add: [SYS_ADMIN, DAC_OVERRIDE, DAC_READ_SEARCH, CHOWN, FOWNER]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

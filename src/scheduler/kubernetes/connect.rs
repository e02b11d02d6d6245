//! The way to a cluster: a kubeconfig, or the service account of the pod that this runs in.

use std::path::Path;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::error::KubeError;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Gives a client, and the namespace that is meant where none is named.
pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<(Client, String), KubeError> {
    let mut config = configured(kubeconfig, context).await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // What is repeated, and when, is decided where it is asked for.
    config.default_retry = false;
    let namespace = config.default_namespace.clone();
    Ok((Client::try_from(config).map_err(KubeError::Client)?, namespace))
}

async fn configured(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Config, KubeError> {
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    let told = |error: kube::config::KubeconfigError| KubeError::Config(Box::new(error));
    match (kubeconfig, context) {
        (Some(path), _) => {
            let file = Kubeconfig::read_from(path).map_err(told)?;
            Config::from_custom_kubeconfig(file, &options).await.map_err(told)
        }
        (None, Some(_)) => Config::from_kubeconfig(&options).await.map_err(told),
        (None, None) => Config::infer().await.map_err(|error| KubeError::Config(Box::new(error))),
    }
}

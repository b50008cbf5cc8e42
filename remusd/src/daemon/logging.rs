//! The daemon's log: to standard error, which systemd keeps; how much can be changed while it runs.

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// The environment's word, which wins over the configuration's.
const VARIABLE: &str = "REMUSD_LOG";

/// How much is logged.
#[derive(Clone, Debug)]
pub struct LogFilter {
    /// `None`: the environment has said it.
    handle: Option<reload::Handle<EnvFilter, Registry>>,
}

impl LogFilter {
    /// Begins to log, as the environment or else the configuration says. Once in a process.
    #[must_use]
    pub fn start(configured: &str) -> Self {
        let said = EnvFilter::try_from_env(VARIABLE).ok();
        let of_environment = said.is_some();
        let filter = said.or_else(|| EnvFilter::try_new(configured).ok()).unwrap_or_else(|| "info".into());
        let (layer, handle) = reload::Layer::new(filter);
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
        tracing_subscriber::registry().with(layer).with(lines).init();
        Self { handle: (!of_environment).then_some(handle) }
    }

    /// Logs as much as this from now on.
    ///
    /// # Errors
    /// A sentence: the environment has said it, or the text is no filter.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        let Some(handle) = &self.handle else { return Err(format!("${VARIABLE} says how much is logged")) };
        let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
        handle.reload(filter).map_err(|error| error.to_string())
    }
}

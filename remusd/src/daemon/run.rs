//! From the command line to a running daemon on a real host.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::figures::Endpoint;
use super::hook::Hook;
use super::logging::LogFilter;
use super::notify::Notify;
use super::reload::{Apply, Live};
use super::witness::{WITNESS_FILE, Witnesses};
use super::{Daemon, Host, listen};
use crate::api::access::{self, Access};
use crate::api::server;
use crate::backup::host::XenHost;
use crate::backup::receiver::ReceiverCommand;
use crate::backup::{BackupSettings, Registry};
use crate::config::Config;
use crate::ops::EventLog;
use crate::pair::{self, Keyring};
use crate::protect::fate::Xl;
use crate::state::StateDir;
use crate::xen::{GuestPages, Hypervisor, RealStore, SuspendGuard, XenHypervisor, XenPages, XenStore};

/// How long the last answers may take to go out.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(1);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Durable state.
    pub state_dir: PathBuf,
    /// Control socket.
    pub socket: PathBuf,
    /// Where other hosts' daemons arrive.
    pub link_socket: PathBuf,
    /// The save helper, unless the default.
    pub save_helper: Option<PathBuf>,
    /// xl.
    pub xl: PathBuf,
    /// The configuration file.
    pub config_path: PathBuf,
    /// What it said, with its drop-ins.
    pub config: Config,
    /// The folder of the domains' policies.
    pub policies: PathBuf,
    /// How much is logged.
    pub log: LogFilter,
}

/// Runs until SIGTERM or SIGINT. Protections outlive the daemon as held output and records: the next start recovers them.
///
/// # Errors
/// When this host's Xen, the sockets or the state cannot be used.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(XenHypervisor::open()?);
    let store: Arc<dyn XenStore> = Arc::new(RealStore::open().await?);
    let state = StateDir::open(&settings.state_dir)?;
    let host_id = state.host()?.id;
    let log = Arc::new(EventLog::default());
    // The control socket is also the lock: a second daemon on the same state would be a second owner.
    let control = listen::control(&settings.socket, settings.config.control.group.as_deref()).await?;
    let link = listen::link(&settings.link_socket).await?;
    let pair_socket = pair::socket::beside(&settings.socket);
    let pair = pair::socket::listen(&pair_socket)
        .await
        .with_context(|| format!("cannot listen at {}", pair_socket.display()))?;
    // Said now and not at the first request.
    let access = access_of(&settings.config).map_err(anyhow::Error::msg)?;

    // Without it there is no audit, but protection all the same.
    let pages: Option<Arc<dyn GuestPages>> = match XenPages::open() {
        Ok(pages) => Some(Arc::new(pages)),
        Err(error) => {
            tracing::error!("no audit: {error}");
            None
        }
    };
    let backup_host = Arc::new(XenHost {
        hypervisor: hypervisor.clone(),
        store: store.clone(),
        lan_check: settings.config.backup.lan_check.clone(),
        pages: pages.clone(),
        xl: settings.xl.clone(),
    });
    let receivers = Arc::new(ReceiverCommand { program: settings.xl.clone(), ..ReceiverCommand::default() });
    let witnesses = Arc::new(Witnesses::new(state.clone(), WITNESS_FILE.into()));
    let backups = Registry::new(
        backup_host,
        receivers,
        Arc::new(state.clone()),
        log.clone(),
        BackupSettings {
            gate: Some(state.gate()),
            xendomains: crate::gate::autostart::Xendomains::of_host,
            ..BackupSettings::default()
        },
        state.host()?,
        witnesses.clone(),
    )?;
    let host = Host {
        hypervisor,
        store,
        pages,
        toolstack: Arc::new(Xl),
        guard: Box::new(SuspendGuard::start_real),
        helper: settings.save_helper.clone(),
    };
    if let Err(text) = settings.config.events.look() {
        // Guests do not wait for who wants to hear of them. It may come to be there.
        tracing::error!("{text}");
    }
    let hook = Arc::new(Hook::start(&log, settings.config.events.clone()));
    let daemon = Arc::new(Daemon::new(host, state, log, backups.clone(), witnesses));
    daemon.follow_activations();
    daemon.count_events();
    backups.recover().await?;
    // Keys that cannot be used keep nobody from being recovered: a guest that runs must be sealed, whatever else is wrong.
    let pairing = match Keyring::open(&settings.state_dir.join("tls"), host_id) {
        Ok(keyring) => Ok(Arc::new(listen::tls(&settings.config, keyring, backups.clone()))),
        Err(error) => {
            tracing::error!("no TLS: {error}");
            Err(error.to_string())
        }
    };
    daemon.set_pairing(pairing.clone());
    tokio::spawn(pair::socket::serve(pair, pairing));
    // Other hosts may ask who runs a guest while we still recover our own, and we may ask them.
    tokio::spawn(listen::serve_links(link, backups.clone()));
    daemon.recover_all().await;
    daemon.resume_protecting();
    daemon.follow_policies(settings.policies.clone());
    tracing::info!("ready");
    let server = server::Server::new(access);
    let endpoint = Arc::new(Endpoint::default());
    if let Err(text) = endpoint.set(&daemon, settings.config.metrics.listen) {
        // Guests do not wait for a monitoring system.
        tracing::error!("{text}");
    }
    daemon.set_live(live(&settings, &server, &daemon, endpoint, hook.clone()));
    tokio::spawn(server.clone().serve(control, daemon.clone()));
    let notify = Notify::of_environment();
    notify.ready();
    tokio::spawn(notify.clone().beat(daemon.clone()));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            result = tokio::signal::ctrl_c() => { result?; break }
            _ = hangup.recv() => {
                notify.reloading();
                match daemon.reload(None).await {
                    Ok(told) => tracing::info!("read anew: {told}"),
                    Err(error) => tracing::error!("cannot be read anew: {error}"),
                }
                notify.ready();
            }
        }
    }
    notify.stopping();
    daemon.shut_down().await;
    tokio::join!(server.flush(LAST_WORDS), hook.finish(LAST_WORDS));
    let _ = std::fs::remove_file(&settings.socket);
    let _ = std::fs::remove_file(&settings.link_socket);
    let _ = std::fs::remove_file(&pair_socket);
    Ok(())
}

fn access_of(config: &Config) -> Result<Access, String> {
    let admin_group = config.control.admins.as_deref().map(access::group).transpose();
    Ok(Access { admin_group: admin_group.map_err(|text| format!("control.admins: {text}"))? })
}

/// What a changed configuration is taken over by.
fn live(
    settings: &Settings,
    server: &server::Server,
    daemon: &Arc<Daemon>,
    endpoint: Arc<Endpoint>,
    hook: Arc<Hook>,
) -> Live {
    // The daemon has this, so this does not have the daemon.
    let daemon = Arc::downgrade(daemon);
    let (socket, server, log) = (settings.socket.clone(), server.clone(), settings.log.clone());
    let apply: Vec<(&str, Apply)> = vec![
        (
            "control.group",
            Box::new(move |config| {
                listen::open_to(&socket, config.control.group.as_deref()).map_err(|error| format!("{error:#}"))
            }),
        ),
        ("control.admins", Box::new(move |config| access_of(config).map(|access| server.set_access(access)))),
        (
            "metrics.",
            Box::new(move |config| match daemon.upgrade() {
                Some(daemon) => endpoint.set(&daemon, config.metrics.listen),
                None => Ok(()),
            }),
        ),
        (
            "events.",
            Box::new(move |config| {
                hook.set(config.events.clone());
                config.events.look()
            }),
        ),
        ("log.", Box::new(move |config| log.set(&config.log.filter))),
    ];
    Live::new(settings.config_path.clone(), settings.config.clone(), apply)
}

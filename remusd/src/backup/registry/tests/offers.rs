use super::fake::Behaviour;
use super::*;

async fn refusal(backup: &Backup, offer: ProtectOffer) -> (RefuseCode, String) {
    match Primary::connect(backup, 1, offer).await {
        Err(LinkError::Refused { code, text, .. }) => (code, text),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    }
}

#[tokio::test]
async fn what_is_in_the_way_is_named_with_what_to_do() {
    for (name, uuid) in [(NAME, 1), ("web--incoming", 2), ("renamed", 0x77)] {
        let backup = Backup::new();
        backup.host.add(name, ProtectionId::from_u128(uuid), false);
        let (code, text) = refusal(&backup, offer()).await;
        assert_eq!(code, RefuseCode::InUse);
        assert!(text.contains("xl destroy 1") && text.contains(name), "{text}");
        assert_eq!(backup.host.names().len(), 1, "nothing that is not ours is touched");
    }

    let backup = Backup::new();
    *backup.host.free_kib.lock().unwrap() = Some(64 * 1024);
    let (code, text) = refusal(&backup, offer()).await;
    assert_eq!(code, RefuseCode::Memory);
    assert!(text.contains("needs 68 MiB") && text.contains("64 MiB free") && text.contains("xl mem-set 0"), "{text}");

    let backup = Backup::new();
    *backup.host.broken.lock().unwrap() = true;
    assert_eq!(refusal(&backup, offer()).await.0, RefuseCode::Host);

    let backup = Backup::new();
    *backup.records.full.lock().unwrap() = true;
    let (code, text) = refusal(&backup, offer()).await;
    assert_eq!(code, RefuseCode::Host);
    assert!(text.contains("no space left"), "{text}");

    let backup = Backup::new();
    for domain in ["", "a/b", "web--incoming"] {
        assert_eq!(refusal(&backup, ProtectOffer { domain: domain.into(), ..offer() }).await.0, RefuseCode::Offer);
    }
    assert_eq!(refusal(&backup, ProtectOffer { detection_ms: 5, ..offer() }).await.0, RefuseCode::Offer);
}

#[tokio::test]
async fn a_receiver_that_cannot_start_is_a_refusal_with_its_words() {
    let backup = Backup::new();
    backup.receivers.behave(Behaviour { dead_on_arrival: true, ..Behaviour::default() });
    let (code, text) = refusal(&backup, offer()).await;
    assert_eq!(code, RefuseCode::Receiver);
    assert!(text.contains("cannot open hypervisor interface"), "{text}");
    assert_eq!(backup.records.phase(UUID), Some(Phase::Discarded));

    backup.receivers.behave(Behaviour { silent: true, ..Behaviour::default() });
    let again = Primary::connect(&backup, 2, offer()).await.err().unwrap();
    assert!(matches!(again, LinkError::Refused { code: RefuseCode::Receiver, .. }));

    backup.receivers.behave(Behaviour::default());
    Primary::connect(&backup, 3, offer()).await.unwrap();
}

fn record(uuid: ProtectionId, name: &str, phase: Phase) -> IncomingRecord {
    IncomingRecord { phase, ..IncomingRecord::receiving(uuid, name, key(5), None) }
}

#[tokio::test]
async fn recovery_destroys_orphans_keeps_what_runs_and_touches_nothing_else() {
    let id = ProtectionId::from_u128;
    let records = MemoryRecords::default();
    *records.records.lock().unwrap() = vec![
        record(id(1), "orphan", Phase::Receiving),
        record(id(2), "started", Phase::Starting),
        record(id(3), "almost", Phase::Starting),
        record(id(4), "old", Phase::Discarded),
    ];
    let backup = Backup::with_records(records);
    backup.host.add("orphan--incoming", id(1), true);
    backup.host.add("started", id(2), false);
    backup.host.add("almost--incoming", id(3), true);
    backup.host.add("old--incoming", id(9), true);
    backup.registry.recover().await.unwrap();
    assert_eq!(backup.host.names(), ["started", "old--incoming"]);
    let roles: Vec<_> = backup.registry.query(None).iter().map(|entry| entry.role).collect();
    assert_eq!(roles, [Role::Discarded, Role::Active, Role::Discarded, Role::Discarded]);

    let started = ProtectOffer { protection: id(2), domain: "started".into(), ..offer() };
    let back = Primary::connect(&backup, 9, started.clone()).await.err().unwrap();
    assert!(matches!(back, LinkError::Superseded { .. }));
    // Once that guest has gone from this host it may be protected here again, but never by an old session.
    backup.host.remove(DomId(2));
    let old = Primary::connect(&backup, 5, started.clone()).await.err().unwrap();
    assert!(matches!(old, LinkError::Refused { code: RefuseCode::Generation, .. }));
    Primary::connect(&backup, 6, started).await.unwrap();
}

#[tokio::test]
async fn a_query_is_answered_and_an_unknown_protection_is_none() {
    let backup = Backup::new();
    let entry = &backup.registry.query(Some(UUID))[0];
    assert_eq!((entry.role, entry.generation), (Role::None, Generation(0)));
    let _primary = Primary::armed(&backup).await;
    let entry = &backup.registry.query(Some(UUID))[0];
    assert_eq!((entry.role, entry.generation, entry.acked), (Role::Armed, Generation(1), Some(Epoch(1))));
    assert_eq!(backup.registry.find("web").unwrap().status().offer, offer());
    assert!(backup.registry.find(&UUID.to_string()).is_some());
}

#[tokio::test]
async fn a_query_goes_over_the_socket() {
    let backup = Backup::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("link.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let registry = Arc::clone(&backup.registry);
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        registry.serve(Connection::new(stream)).await
    });
    let transport = crate::link::Transport::Unix(path);
    let entries = PrimaryLink::query(&transport, None, &options()).await.unwrap();
    assert_eq!(entries, []);
}
